"""JSON bodies -> jobs: the original's API and OpenAI's, checked to the last key. Knows nothing of TorchServe."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gptchat.config import UserError
from gptchat.dialogue import encode_prompt
from gptchat.sampling import Sampling
from gptchat.tokenizer import Tokenizer, WordFilter

ROLES = ("system", "developer", "user", "assistant")
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": "", "tools": [],
           "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}  # what would change nothing
UNABLE = {"tools": "call tools", "functions": "call functions", "response_format": "keep to a format", "audio": "speak",
          "modalities": "speak", "suffix": "fill in before a suffix", "logit_bias": "be biased by ids",
          "presence_penalty": "do so (repetition_penalty it can)", "frequency_penalty": "do so (repetition_penalty it can)"}


class Refusal(Exception):
    """A request that is answered with `status` and a reason; `param` and `code` are OpenAI's."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code


@dataclass(frozen=True)
class Served:
    """What this worker serves. `task` is lm or chatlm, `n_ctx` in tokens, `limits` those of model-config.yaml."""

    name: str
    task: str
    tokenizer: Tokenizer
    n_ctx: int
    limits: Any
    created: int

    @cached_property
    def longest_token(self) -> int:
        """In bytes: no text of more than n_ctx times as many characters fits."""
        return max(map(len, self.tokenizer.token_bytes))


@dataclass(frozen=True)
class Prompt:
    input_ids: list[int]
    token_type_ids: list[int] | None = None
    beginning: tuple[int, ...] = ()  # of the answer, given by the client: part of the prompt and of the answer


@dataclass(frozen=True)
class Job:
    """One HTTP request, understood: each prompt is to be continued by `n` candidates."""

    kind: str  # original, completions or chat
    prompts: list[Prompt]
    sampling: Sampling
    n: int
    stop: tuple[str, ...]
    stream: bool
    echo: bool = False
    usage: bool = False  # a stream's last chunk tells it
    request: Any = None  # the original's API gives it back


class Body:
    """A JSON object whose keys are taken one by one; `close` refuses what nobody took."""

    def __init__(self, values: Any):
        if not isinstance(values, dict):
            raise Refusal("the body is no JSON object")
        self.values = {key: value for key, value in values.items() if value is not None}

    def take(self, names: str, right: Callable[[Any], Any], wanted: str, default: Any = None) -> Any:
        """The value under that one of `names` (parted by |) that is there. Raises Refusal if it is not right."""
        found = [name for name in names.split("|") if name in self.values]
        if not found:
            return default
        value = self.values.pop(found[0])
        if not right(value):
            raise Refusal(f"{found[0]} is {shown(value)}, wanted {wanted}", param=found[0])
        return value

    def integer(self, names: str, low: int, high: int, default: int | None = None) -> Any:
        return self.take(names, lambda x: type(x) is int and low <= x <= high, f"an integer from {low} to {high}", default)

    def number(self, name: str, high: float, default: float) -> float:
        right = self.take(name, lambda x: type(x) in (int, float) and 0 <= x <= high, f"a number from 0 to {high}", default)
        return float(right)

    def flag(self, name: str) -> bool:
        return self.take(name, lambda x: type(x) is bool, "true or false", False)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        value = self.take(name, lambda x: x != "" and is_text(x) or is_texts(x, most) and "" not in x,
                          f"a string, or up to {most} in a list, none empty", ())
        return (value,) if isinstance(value, str) else tuple(value)

    def close(self) -> None:
        for name in self.values:
            raise Refusal(f"{name}: this model cannot {UNABLE[name]}" if name in UNABLE else
                          f"unknown setting {shown(name)}", param=name)


def shown(value: Any) -> str:
    """A value in an error message: as JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: JSON's escapes can write half a surrogate pair too."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_texts(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(map(is_text, value))


def is_ids(value: Any, vocabulary: int) -> bool:
    return isinstance(value, list) and all(type(id) is int and 0 <= id < vocabulary for id in value)


def parse(path: str, values: Any, served: Served) -> Job:
    """The job that a POST to `path` (what follows /predictions/NAME/1.0/) asks for. Raises Refusal."""
    readers = {"": read_original, "v1/completions": read_completions, "v1/chat/completions": read_chat}
    if path not in readers:
        raise Refusal(f"no such path: {path[:60]}", 404)
    body = Body(values)
    if path:
        if (name := body.take("model", is_text, "a string", served.name)) != served.name:
            raise Refusal(f"no model {shown(name)} here: this is {served.name}", 404, "model", "model_not_found")
        for key, value in [*body.values.items()]:
            if key in IGNORED or key in NEUTRAL and value == NEUTRAL[key]:
                del body.values[key]
    job = readers[path](body, served)
    body.close()
    if len(job.prompts) * job.n > served.limits.max_prompts:
        raise Refusal(f"{len(job.prompts) * job.n} answers at once, wanted at most {served.limits.max_prompts}", param="n")
    return job


def read_sampling(body: Body, served: Served, room: int, default: int, logprobs: int | None = None) -> Sampling:
    """The settings by their usual names; the prompt leaves `room` new tokens."""
    words = body.texts("bad_words", served.limits.max_bad_words)
    most = min(served.limits.max_new_tokens, served.n_ctx)
    new = body.integer("max_tokens|max_new_tokens|max_completion_tokens", 0, most, min(default, room))
    if new > room:
        raise Refusal(f"the context of {served.n_ctx} tokens has room for {room} new ones beside the prompt, not {new}",
                      param="max_tokens", code="context_length_exceeded")
    try:
        return Sampling(
            temperature=body.number("temperature", 100, 1), top_k=body.integer("top_k", 0, 1 << 30, 0),
            top_p=body.number("top_p", 1, 1), min_p=body.number("min_p", 1, 0), logprobs=logprobs, max_new_tokens=new,
            repetition_penalty=body.number("repetition_penalty", 100, 1),
            seed=body.integer("seed", -(1 << 63), (1 << 63) - 1, secrets.randbits(31)),
            word_filter=WordFilter(served.tokenizer, words) if words else None)
    except ValueError as error:
        raise Refusal(str(error)) from None


def read_common(body: Body, served: Served, n: int = 1, most: int = 1 << 30) -> tuple[int, tuple[str, ...], bool]:
    """Number of candidates, stop strings, whether to stream: as Job has them."""
    most = min(most, served.limits.max_candidates, served.limits.slots)
    stop, stream = body.texts("stop", served.limits.max_stops), body.flag("stream")
    return body.integer("n|num_return_sequences", 1, most, min(n, most)), stop, stream


def encode(served: Served, text: str) -> list[int]:
    """A text's ids; one that cannot fit whatever its ids are is not even encoded."""
    if len(text) > served.n_ctx * served.longest_token:
        raise Refusal(f"{len(text)} characters cannot fit into the context of {served.n_ctx} tokens",
                      code="context_length_exceeded")
    return served.tokenizer.encode(text)


def dialogue_prompt(served: Served, turns: list[tuple[int, str]], beginning: str, new: int) -> Prompt:
    """Turns that do not fit beside `new` tokens (or half the context) go, the oldest first, not even encoded."""
    begun, room = encode(served, beginning), served.n_ctx - min(new, served.n_ctx // 2)
    encoded: list[tuple[int, list[int]]] = []
    for speaker, text in reversed(turns):
        encoded.insert(0, (speaker, encode(served, text)))
        if sum(len(ids) for _, ids in encoded) > room:
            break
    try:
        ids, types = encode_prompt(encoded, begun, served.tokenizer.cls_id, served.tokenizer.sep_id, room)
    except UserError as error:
        raise Refusal(str(error), code="context_length_exceeded") from None
    return Prompt(list(ids), list(types), tuple(begun))


def text_prompts(served: Served, texts: list[Any]) -> tuple[list[Prompt], int]:
    """Prompts (text or ids) to be continued as they are, and the room they leave. An empty one begins at [EOS]; a
    ChatLM takes them for the responder's words."""
    prompts = [(encode(served, text) if isinstance(text, str) else text) or [served.tokenizer.eos_id] for text in texts]
    room = served.n_ctx - max(map(len, prompts))
    if room < 0:
        raise Refusal(f"a prompt has {served.n_ctx - room} tokens, the context {served.n_ctx}", param="prompt",
                      code="context_length_exceeded")
    return [Prompt(ids, [1] * len(ids) if served.task == "chatlm" else None) for ids in prompts], room


def read_original(body: Body, served: Served) -> Job:
    """`{"context": text or turns, "response": beginning, ...}`: five candidates, or one if streamed."""
    request = {key: body.values[key] for key in ("context", "response") if key in body.values}
    context = body.take("context", lambda x: is_text(x) or x and is_texts(x, 1000), "a text, or a list of turns")
    beginning = body.take("response", is_text, "a string", "")
    streamed, default = body.values.get("stream") is True, served.limits.default_new_tokens
    n, stop, stream = read_common(body, served, 5, 1 if streamed else 1 << 30)
    if context is None:
        raise Refusal('found no context; wanted {"context": "some text"}', param="context")
    if served.task == "chatlm":
        turns = [*enumerate(reversed([context] if isinstance(context, str) else context))][::-1]  # the last: the client's
        sampling = read_sampling(body, served, served.n_ctx, min(default, served.n_ctx // 2))
        prompts = [dialogue_prompt(served, [(i % 2, text) for i, text in turns], beginning, sampling.max_new_tokens)]
    elif not isinstance(context, str) or beginning:
        raise Refusal(f"{served.name} continues a text: wanted a string as context, and no response", param="context")
    else:
        prompts, room = text_prompts(served, [context])
        sampling = read_sampling(body, served, room, default)
    return Job("original", prompts, sampling, n, stop, stream, request=request)


def read_completions(body: Body, served: Served) -> Job:
    """OpenAI's completions, which continue texts. `echo` with `logprobs` scores them."""
    most, size = served.limits.max_prompts, served.tokenizer.vocab_size
    prompt = body.take("prompt", lambda x: is_text(x) or is_ids(x, size) or isinstance(x, list) and len(x) <= most and all(
        is_text(item) or is_ids(item, size) for item in x), f"a text, ids below {size}, or up to {most} of them in a list", "")
    single = isinstance(prompt, str) or is_ids(prompt, size)
    prompts, room = text_prompts(served, [prompt] if single else prompt)
    sampling = read_sampling(body, served, room, 16, body.integer("logprobs", 0, served.limits.max_logprobs))
    return Job("completions", prompts, sampling, *read_common(body, served), body.flag("echo"), read_usage(body))


def read_chat(body: Body, served: Served) -> Job:
    """OpenAI's chat completions. The system's messages count as the user's side."""
    if served.task != "chatlm":
        raise Refusal(f"{served.name} continues texts and does not chat: use v1/completions")
    messages = body.take("messages", lambda x: isinstance(x, list) and 0 < len(x) <= 1000, "1 to 1000 messages", [{}])
    turns = [read_message(message) for message in messages]
    top = body.integer("top_logprobs", 0, served.limits.max_logprobs, 0)
    sampling = read_sampling(body, served, served.n_ctx, min(served.limits.default_new_tokens, served.n_ctx // 2),
                             top if body.flag("logprobs") else None)
    prompt = dialogue_prompt(served, turns, "", sampling.max_new_tokens)
    return Job("chat", [prompt], sampling, *read_common(body, served), usage=read_usage(body))


def read_message(message: Any) -> tuple[int, str]:
    """A message's speaker and text, which may come in parts."""
    message = message if isinstance(message, dict) else {}
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and is_text(part.get("text")) for part in content):
        content = "".join(part["text"] for part in content)
    if role not in ROLES or not is_text(content):
        raise Refusal(f"a message wants a role among {', '.join(ROLES)}, and text as content: this model sees no images, "
                      "hears nothing and calls no tools", param="messages")
    return int(role == "assistant"), content


def read_usage(body: Body) -> bool:
    options = body.take("stream_options", lambda x: isinstance(x, dict) and set(x) <= {"include_usage", "include_obfuscation"},
                        "an object with include_usage", {})
    return options.get("include_usage") is True
