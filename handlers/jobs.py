"""JSON bodies -> jobs: the original's API and OpenAI's, checked to the last key. Knows nothing of TorchServe."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gptchat.console import UserError
from gptchat.data.dialogue import SPEAKERS, encode_prompt
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.generate import CHAT_SAMPLING
from gptchat.inference.sampling import SETTINGS, Sampling
from gptchat.inference.text import WordFilter

NEUTRAL: dict[
    str, Any
] = {  # OpenAI's settings that change nothing with these values (...: with any)
    "user": ...,
    "metadata": ...,
    "store": ...,
    "service_tier": ...,
    "safety_identifier": ...,
    "prompt_cache_key": ...,
    "parallel_tool_calls": ...,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "tools": [],
    "suffix": "",
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
NUMBERS = tuple(name for name, declared in SETTINGS.items() if declared.type is float)
LONGEST_WORD = (
    200  # characters of a stop string or forbidden word: their tables grow with the square
)
TOO_LONG = "context_length_exceeded"


class Refusal(Exception):
    """A request that is answered with `status` and a reason; `param` and `code` are OpenAI's."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ):
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
    stop_id: int

    @cached_property
    def longest_text(self) -> int:
        """Characters; longer ones no tokens can make fit."""
        return self.n_ctx * max(map(len, self.tokenizer.token_bytes))


@dataclass(frozen=True)
class Job:
    """One HTTP request, understood: each prompt is to be continued by `n` candidates."""

    kind: str  # original, completions or chat
    prompts: list[tuple[list[int], list[int] | None]]  # ids and types
    sampling: Sampling
    n: int
    stop: tuple[str, ...]
    stream: bool
    beginning: tuple[
        int, ...
    ] = ()  # of the answer, given by the client: part of the prompt and of the answer
    echo: bool = False
    usage: bool = False  # a stream's last chunk tells it
    request: Any = None  # the original's API gives it back


def is_text(value: Any) -> bool:
    """A string that UTF-8 can hold: JSON's escapes can write half a surrogate pair too."""
    return isinstance(value, str) and not any(
        "\ud800" <= character <= "\udfff" for character in value
    )


def is_word(value: Any) -> bool:
    return is_text(value) and 0 < len(value) <= LONGEST_WORD


def is_list(value: Any, most: float, right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and 0 < len(value) <= most and all(map(right, value))


class Reader:
    """Takes the keys of a body one by one, and refuses it if one is left. Everything raises Refusal."""

    def __init__(self, body: Any, served: Served):
        if isinstance(body, (bytes, bytearray)):  # TorchServe could not read it
            try:
                body = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise Refusal(f"the body is not JSON: {str(error)[:80]}") from None
        if not isinstance(body, dict):
            raise Refusal("the body is no JSON object")
        self.values = {key: value for key, value in body.items() if value is not None}
        self.served, self.limits, self.chats = served, served.limits, served.task == "chatlm"

    def read(self, path: str) -> Job:
        """The job that a POST to `path` (what follows /predictions/NAME/1.0/) asks for."""
        kinds = {
            "": self.original,
            "v1/completions": self.completions,
            "v1/chat/completions": self.chat,
        }
        if path not in kinds:
            raise Refusal(f"no such path: {path[:60]}", 404)
        self.usual = (
            Sampling() if path else CHAT_SAMPLING
        )  # OpenAI's clients expect settings that change nothing
        if path:
            if (
                name := self.take("model", is_text, "a string", self.served.name)
            ) != self.served.name:
                raise Refusal(
                    f"no model {name!r:.60}: this is {self.served.name}",
                    404,
                    "model",
                    "model_not_found",
                )
            self.values = {
                k: v
                for k, v in self.values.items()
                if k not in NEUTRAL or NEUTRAL[k] not in (v, ...)
            }
        job = kinds[path]()
        for name in self.values:
            raise Refusal(
                f"{name!r:.60} is unknown here, or more than this model can do", param=f"{name:.60}"
            )
        if (count := len(job.prompts) * job.n) > self.limits.max_prompts:
            raise Refusal(
                f"{count} answers at once, wanted at most {self.limits.max_prompts}", param="n"
            )
        return job

    def take(
        self, names: str, right: Callable[[Any], Any], wanted: str, default: Any = None
    ) -> Any:
        """The value under that one of `names` (parted by |) that is there."""
        for name in names.split("|"):
            if name in self.values:
                if not right(value := self.values.pop(name)):
                    raise Refusal(f"{name} is {value!r:.60}, wanted {wanted}", param=name)
                return value
        return default

    def integer(self, names: str, low: int, high: int, default: int | None = None) -> Any:
        return self.take(
            names,
            lambda x: type(x) is int and low <= x <= high,
            f"an integer, {low} to {high}",
            default,
        )

    def number(self, name: str) -> Any:  # a float
        low, high = SETTINGS[name].metadata["low"], SETTINGS[name].metadata["high"]
        default = getattr(self.usual, name)
        wanted = f"a number, {low} to {high}"
        return float(
            self.take(name, lambda x: type(x) in (int, float) and low <= x <= high, wanted, default)
        )

    def flag(self, name: str) -> bool:
        return self.take(name, lambda x: type(x) is bool, "true or false", False)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        value = self.take(
            name,
            lambda x: is_word(x) or is_list(x, most, is_word) or x == [],
            f"a string of 1 to {LONGEST_WORD} characters, or up to {most} in a list",
            (),
        )
        return (value,) if isinstance(value, str) else tuple(value)

    def sampling(self, room: int, default: int, logprobs: int | None = None) -> Sampling:
        """The settings by their usual names; the prompt leaves `room` new tokens."""
        words, n_ctx = self.texts("bad_words", self.limits.max_bad_words), self.served.n_ctx
        most = min(self.limits.max_new_tokens, n_ctx)
        new = self.integer(
            "max_tokens|max_new_tokens|max_completion_tokens", 0, most, min(default, room)
        )
        if new > room:
            raise Refusal(
                f"the context of {n_ctx} tokens has room for {room} new ones, not {new}",
                code=TOO_LONG,
            )
        return Sampling(
            **{name: self.number(name) for name in NUMBERS},
            max_new_tokens=new,
            logprobs=logprobs,
            top_k=self.integer("top_k", 0, 10**9, self.usual.top_k),
            seed=self.integer("seed", -(1 << 63), (1 << 63) - 1, secrets.randbits(31)),
            word_filter=WordFilter(self.served.tokenizer, words) if words else None,
        )

    def common(self, n: int = 1) -> dict[str, Any]:
        most = min(self.limits.max_candidates, self.limits.slots)
        return {
            "stop": self.texts("stop", self.limits.max_stops),
            "stream": self.flag("stream"),
            "n": self.integer("n|num_return_sequences", 1, most, min(n, most)),
        }

    def openai(self) -> dict[str, Any]:
        options = self.take(
            "stream_options",
            lambda x: isinstance(x, dict) and {*x} <= {"include_usage"},
            "an object with include_usage",
            {},
        )
        return self.common() | {"usage": options.get("include_usage") is True}

    def encode(self, text: str) -> list[int]:
        if len(text) > self.served.longest_text:
            raise Refusal(
                f"{len(text)} characters cannot fit into {self.served.n_ctx} tokens", code=TOO_LONG
            )
        return self.served.tokenizer.encode(text)

    def answering(
        self, turns: list[tuple[int, str]], beginning: str, logprobs: int | None = None
    ) -> dict[str, Any]:
        """A dialogue's prompt and settings. What does not fit beside the new tokens (or half the context) goes, the
        oldest turns first, not even encoded."""
        half, tokenizer = self.served.n_ctx // 2, self.served.tokenizer
        sampling = self.sampling(
            self.served.n_ctx, min(self.limits.default_new_tokens, half), logprobs
        )
        begun, room = self.encode(beginning), self.served.n_ctx - min(sampling.max_new_tokens, half)
        encoded: list[tuple[int, list[int]]] = []
        for speaker, text in reversed(turns):
            if encoded and (
                sum(len(ids) for _, ids in encoded) > room or len(text) > self.served.longest_text
            ):
                break
            encoded.insert(0, (speaker, self.encode(text)))
        try:
            prompt = encode_prompt(encoded, begun, tokenizer.cls_id, tokenizer.sep_id, room)
        except UserError as error:
            raise Refusal(str(error), code=TOO_LONG) from None
        return {"prompts": [prompt], "sampling": sampling, "beginning": tuple(begun)}

    def continuing(
        self, texts: list[Any], default: int = 0, logprobs: int | None = None
    ) -> dict[str, Any]:
        """Prompts (text or ids) to be continued as they are, an empty one from [EOS], and their settings. A ChatLM
        takes them for the responder's words."""
        prompts = [
            (self.encode(x) if isinstance(x, str) else x) or [self.served.tokenizer.eos_id]
            for x in texts
        ]
        longest, n_ctx = max(map(len, prompts)), self.served.n_ctx
        if longest > n_ctx:
            raise Refusal(f"a prompt has {longest} tokens, the context {n_ctx}", code=TOO_LONG)
        return {
            "prompts": [(ids, [1] * len(ids) if self.chats else None) for ids in prompts],
            "sampling": self.sampling(
                n_ctx - longest, default or self.limits.default_new_tokens, logprobs
            ),
        }

    def original(self) -> Job:
        """`{"context": text or turns, "response": beginning, ...}`: five candidates, or one if streamed."""
        request = {key: self.values[key] for key in ("context", "response") if key in self.values}
        context = self.take(
            "context",
            lambda x: is_text(x) or is_list(x, 1000, is_text),
            "a text, or a list of turns",
        )
        beginning = self.take("response", is_text, "a string", "")
        common = self.common(1 if self.values.get("stream") is True else 5)
        if common["stream"] and common["n"] > 1:
            raise Refusal(f"n is {common['n']}, wanted 1 with stream", param="n")
        if context is None or not self.chats and (beginning or isinstance(context, list)):
            raise Refusal(
                'wanted {"context": "some text"}'
                + ("" if self.chats else ": an LM continues one text")
            )
        texts = [context] if isinstance(context, str) else context
        turns = [
            ((len(texts) - 1 - i) % 2, text) for i, text in enumerate(texts)
        ]  # the last one is the client's
        prompts = self.answering(turns, beginning) if self.chats else self.continuing(texts)
        return Job("original", request=request, **common, **prompts)

    def completions(self) -> Job:
        """OpenAI's completions, which continue texts. `echo` with `logprobs` scores them."""
        most, size = self.limits.max_prompts, self.served.tokenizer.vocab_size

        def is_prompt(x: Any) -> bool:
            return (
                is_text(x)
                or x == []
                or is_list(x, float("inf"), lambda id: type(id) is int and 0 <= id < size)
            )

        prompt = self.take(
            "prompt",
            lambda x: is_prompt(x) or is_list(x, most, is_prompt),
            f"a text, ids below {size}, or up to {most} of them in a list",
            "",
        )
        logprobs = self.integer("logprobs", 0, self.limits.max_logprobs)
        prompts = self.continuing([prompt] if is_prompt(prompt) else prompt, 16, logprobs)
        return Job("completions", echo=self.flag("echo"), **prompts, **self.openai())

    def chat(self) -> Job:
        """OpenAI's chat completions. The system's messages count as the user's side."""
        if not self.chats:
            raise Refusal(
                f"{self.served.name} continues texts and does not chat: use v1/completions"
            )
        messages = self.take(
            "messages", lambda x: is_list(x, 1000, lambda _: True), "1 to 1000 messages", [None]
        )
        top, asked = (
            self.integer("top_logprobs", 0, self.limits.max_logprobs, 0),
            self.flag("logprobs"),
        )
        prompt = self.answering(
            [read_message(message) for message in messages], "", top if asked else None
        )
        return Job("chat", **prompt, **self.openai())


def read_message(message: Any) -> tuple[int, str]:
    """A message's speaker and text, which may come in parts."""
    role: Any = message.get("role") if isinstance(message, dict) else None
    content: Any = message["content"] if role and "content" in message else None
    if is_list(
        content, float("inf"), lambda part: isinstance(part, dict) and is_text(part.get("text"))
    ):
        content = "".join(part["text"] for part in content)
    if role not in [*SPEAKERS] or not is_text(content):
        raise Refusal(
            f"a message wants a role among {', '.join(SPEAKERS)}, and text as content: this model sees no "
            "images, hears nothing and calls no tools",
            param="messages",
        )
    return SPEAKERS[role], content
