"""JSON bodies -> jobs: the original program's API and OpenAI's.

A `Job` is a request that has been understood: the engine's requests for it, and how to answer.
`JobReader.read` raises `Refusal` for a body that is wrong, too long or beyond the server's limits,
so that whatever becomes a job can be served.

The original's API is strict: an unknown key is refused, and so is a length that does not fit. On
OpenAI's paths clients that were written for larger models are served as well as can be: what is not
read is ignored if it may be (`unread.py`), and a length is cut down to what fits.
"""

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from gptchat.console import UserError
from gptchat.data.dialogue import SPEAKERS, alternate
from gptchat.inference.engine import Request
from gptchat.inference.generate import CHAT_SAMPLING, prompt_room
from gptchat.inference.rerank import CANDIDATES
from gptchat.inference.sampling import SETTINGS, Sampling
from gptchat.inference.text import WordFilter
from handlers.fields import Fields, Refusal, is_list, is_text
from handlers.served_model import ServedModel
from handlers.unread import check_unread, counted_name

# The names of two settings; where several are given on OpenAI's paths, the first one here counts.
LENGTH_NAMES = ("max_completion_tokens", "max_tokens", "max_new_tokens")
CANDIDATES_NAMES = ("n", "num_return_sequences")
OPENAI_SAMPLING = Sampling()  # OpenAI's clients expect settings that change nothing
COMPLETION_TOKENS = 16  # OpenAI's default length of a completion
LARGEST_INTEGER = 10**9  # of a setting that has no upper limit of its own
LARGEST_LENGTH = (1 << 63) - 1  # that is cut down to what fits
MOST_TURNS = 1000
TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class Job:
    """One HTTP request, understood. Its engine requests, one a prompt, share `sampling` and `n`."""

    kind: str  # original, completions or chat
    requests: list[Request]
    stop: tuple[str, ...]
    stream: bool
    beginning: tuple[int, ...] = ()  # ids of the answer's first words, where the client gave them
    echo: bool = False  # the prompt's text comes before the answer
    include_usage: bool = False  # a stream ends with the numbers of tokens
    original_request: Any = None  # given back in the original's API
    ignored: Collection[str] = ()  # fields of the body, as `unread.py` counts them

    @property
    def sampling(self) -> Sampling:
        return self.requests[0].sampling

    @property
    def n(self) -> int:
        """Candidates of each prompt."""
        return self.requests[0].n

    @property
    def original_bytes(self) -> int:
        """Of the part of the request that the answer gives back."""
        if self.original_request is None:
            return 0
        return len(json.dumps(self.original_request))


class JobReader:
    """Reads one body into a job. Every method raises Refusal."""

    def __init__(self, body: Any, model: ServedModel):
        self.body = Fields(body)
        self.model = model
        self.settings = model.settings
        self.tokenizer = model.generator.tokenizer
        self.n_ctx = model.generator.n_ctx
        self.is_chat_model = model.generator.task == "chatlm"
        self.is_lenient = False  # on OpenAI's paths
        self.ignored: set[str] = set()

    def read(self, path: str) -> Job:
        """The job that a POST to `path` (what follows /predictions/NAME/1.0/) asks for."""
        if path == "":
            job = self.original()
            self.body.refuse_untaken()
        else:
            job = self.openai(path)
        answers = len(job.requests) * job.n
        if answers > self.settings.max_prompts:
            message = f"{answers} answers at once, wanted at most {self.settings.max_prompts}"
            raise Refusal(message, param="n")
        return job

    def openai(self, path: str) -> Job:
        """What one of OpenAI's clients asks for."""
        self.is_lenient = True
        readers = {"v1/completions": self.completions, "v1/chat/completions": self.chat}
        if path not in readers:
            raise Refusal(f"no such path: {path[:60]}", 404)
        self.check_model()
        job = readers[path]()
        return replace(job, ignored=self.ignored | check_unread(self.body.values))

    def original(self) -> Job:
        """The API of the original program: five candidates, or one if it is streamed.

        `{"context": a text or a list of turns, "response": the answer's first words, ...}`
        """
        values = self.body.values
        original_request = {key: values[key] for key in ("context", "response") if key in values}
        context = self.body.take("context", is_context, "a text, or a list of turns")
        beginning = self.body.take("response", is_text, "a string", "")
        stop = self.stop_strings()
        stream = self.body.flag("stream")
        n = self.candidates(default=1 if stream else CANDIDATES)
        if stream and n > 1:
            raise Refusal(f"n is {n}, wanted 1 with stream", param="n")
        if context is None and self.is_chat_model:
            raise Refusal('wanted {"context": "some text"}')
        if not self.is_chat_model and (beginning or not isinstance(context, str)):
            raise Refusal('wanted {"context": "some text"}: an LM continues one text')
        beginning_ids: list[int] = []
        if self.is_chat_model:
            beginning_ids = self.encode(beginning)
            turns = [context] if isinstance(context, str) else context
            sampling = self.chat_sampling(CHAT_SAMPLING)
            dialogue = alternate(turns, last_speaker=SPEAKERS["user"])
            requests = [self.reply(dialogue, sampling, n, beginning_ids)]
        else:
            requests = self.continuations(
                [context], CHAT_SAMPLING, self.settings.default_new_tokens, n
            )
        return Job(
            kind="original",
            requests=requests,
            stop=stop,
            stream=stream,
            beginning=tuple(beginning_ids),
            original_request=original_request,
        )

    def completions(self) -> Job:
        """OpenAI's completions, which continue texts. `echo` with `logprobs` scores them."""
        most = self.settings.max_prompts
        prompts = self.body.take(
            "prompt",
            lambda value: self.is_prompt(value) or is_list(value, self.is_prompt, most),
            f"a text, ids below {self.tokenizer.vocab_size}, or up to {most} of them in a list",
            "",
        )
        self.body.take("messages", lambda _: False, "none: v1/chat/completions takes them")
        if self.is_prompt(prompts):
            prompts = [prompts]
        logprobs = self.body.integer("logprobs", 0, self.settings.max_logprobs)
        echo = self.body.flag("echo")
        stop = self.stop_strings()
        stream = self.body.flag("stream")
        n = self.candidates(default=1)
        return Job(
            kind="completions",
            requests=self.continuations(
                prompts,
                OPENAI_SAMPLING,
                COMPLETION_TOKENS,
                n,
                logprobs=logprobs,
                score_prompt=echo and logprobs is not None,
            ),
            stop=stop,
            stream=stream,
            echo=echo,
            include_usage=self.include_usage(),
        )

    def chat(self) -> Job:
        """OpenAI's chat completions. The system's messages count as the user's side."""
        if not self.is_chat_model:
            name = self.model.name
            raise Refusal(f"{name} continues texts and does not chat: use v1/completions")
        messages = self.body.take(
            "messages",
            lambda value: is_list(value, lambda _: True, MOST_TURNS),
            f"1 to {MOST_TURNS} messages",
            [None],
        )
        read = [read_message(message) for message in messages]
        turns = [turn for turn in read if turn is not None]
        logprobs = self.body.integer("top_logprobs", 0, self.settings.max_logprobs, 0)
        if not self.body.flag("logprobs"):
            logprobs = None
        stop = self.stop_strings()
        stream = self.body.flag("stream")
        n = self.candidates(default=1)
        sampling = self.chat_sampling(OPENAI_SAMPLING, logprobs)
        return Job(
            kind="chat",
            requests=[self.reply(turns, sampling, n)],
            stop=stop,
            stream=stream,
            include_usage=self.include_usage(),
        )

    # --- prompts

    def is_prompt(self, value: Any) -> bool:
        """A text or token ids; no ids are an empty text."""

        def is_id(item: Any) -> bool:
            return type(item) is int and 0 <= item < self.tokenizer.vocab_size

        return is_text(value) or value == [] or is_list(value, is_id)

    def encode(self, text: str) -> list[int]:
        if len(text) > self.model.longest_text:
            message = f"{len(text)} characters cannot fit into {self.n_ctx} tokens"
            raise Refusal(message, code=TOO_LONG)
        return self.tokenizer.encode(text)

    def reply(
        self,
        turns: list[tuple[int, str]],
        sampling: Sampling,
        n: int,
        beginning: list[int] | None = None,
    ) -> Request:
        """The request for a dialogue's next turn, which starts with `beginning`.

        The oldest turns are dropped until the answer has room; turns that cannot fit are not even
        encoded.
        """
        room = prompt_room(self.n_ctx, sampling.max_new_tokens)
        encoded: list[tuple[int, list[int]]] = []  # the last turn first
        n_tokens = 0
        for speaker, text in reversed(turns):
            if encoded and (n_tokens > room or len(text) > self.model.longest_text):
                break
            ids = self.encode(text)
            encoded.append((speaker, ids))
            n_tokens += len(ids)
        try:
            return self.model.generator.request(encoded[::-1], sampling, n, beginning or [])
        except UserError as error:
            raise Refusal(str(error), code=TOO_LONG) from None

    def continuations(
        self,
        prompts: list[Any],
        defaults: Sampling,
        default_new_tokens: int,
        n: int,
        logprobs: int | None = None,
        score_prompt: bool = False,
    ) -> list[Request]:
        """Requests that continue prompts (text or ids) as they are; an empty one starts from [EOS].
        A ChatLM takes them for the responder's words."""
        generator = self.model.generator
        encoded = []
        for prompt in prompts:
            ids = self.encode(prompt) if isinstance(prompt, str) else prompt
            if not ids and not 0 <= self.tokenizer.eos_id < generator.n_vocab:
                raise Refusal("a prompt is empty, and the model has no [EOS] to start from")
            encoded.append(ids or [self.tokenizer.eos_id])
        longest = max(map(len, encoded))
        if longest > self.n_ctx:
            message = f"a prompt has {longest} tokens, the context {self.n_ctx}"
            raise Refusal(message, code=TOO_LONG)
        sampling = self.sampling(defaults, self.n_ctx - longest, default_new_tokens, logprobs)
        stop_ids = generator.stop_ids
        requests = []
        for ids in encoded:
            types = [1] * len(ids) if self.is_chat_model else None
            requests.append(Request(ids, types, sampling, n, stop_ids, score_prompt))
        return requests

    # --- settings

    def check_model(self) -> None:
        """OpenAI's clients name the model, which must be this one."""
        name = self.body.take("model", is_text, "a string", self.model.name)
        if name != self.model.name:
            message = f"no model {name!r:.60}: this is {self.model.name}"
            raise Refusal(message, 404, "model", "model_not_found")

    def stop_strings(self) -> tuple[str, ...]:
        return self.body.words("stop", self.settings.max_stops)

    def candidates(self, default: int) -> int:
        most = min(self.settings.max_candidates, self.model.generator.engine.slots)
        return self.one_of(CANDIDATES_NAMES, 1, most, min(default, most))

    def one_of(self, names: tuple[str, ...], low: int, high: int, default: int) -> int:
        """The integer that is given under one of a setting's names."""
        given = self.body.integers(names, low, high)
        if len(given) > 1 and not self.is_lenient:
            raise Refusal(f"wanted one of {', '.join(names)}: they are the same", param=names[0])
        return given[0] if given else default

    def include_usage(self) -> bool:
        options = self.body.take("stream_options", is_options, "include_usage: true or false", {})
        self.ignored |= {counted_name(name) for name in options if name != "include_usage"}
        return options.get("include_usage") is True

    def chat_sampling(self, defaults: Sampling, logprobs: int | None = None) -> Sampling:
        """Settings of an answer in a dialogue, whose turns will be cut to make room for it."""
        default_new_tokens = min(self.settings.default_new_tokens, self.n_ctx // 2)
        return self.sampling(defaults, self.n_ctx, default_new_tokens, logprobs)

    def sampling(
        self, defaults: Sampling, room: int, default_new_tokens: int, logprobs: int | None
    ) -> Sampling:
        """The sampling settings by their usual names, with room for `room` new tokens."""
        forbidden = self.body.words("bad_words", self.settings.max_bad_words)
        max_new_tokens = self.max_new_tokens(room, default_new_tokens)
        chosen = {
            name: self.setting(name, getattr(defaults, name))
            for name in SETTINGS
            if name != "max_new_tokens"
        }
        return Sampling(
            **chosen,
            max_new_tokens=max_new_tokens,
            logit_bias=self.body.biases(
                "logit_bias", self.tokenizer.vocab_size, self.settings.max_biases
            ),
            logprobs=logprobs,
            seed=self.body.integer("seed", -(1 << 63), (1 << 63) - 1, secrets.randbits(31)),
            word_filter=WordFilter(self.tokenizer, forbidden) if forbidden else None,
        )

    def setting(self, name: str, default: Any) -> Any:
        """A setting that `sampling.SETTINGS` declares, within its range."""
        declared = SETTINGS[name]
        low, high = declared.metadata["low"], declared.metadata["high"]
        if declared.type is int:
            return self.body.integer(name, low, LARGEST_INTEGER if high == inf else high, default)
        return self.body.number(name, low, high, default)

    def max_new_tokens(self, room: int, default: int) -> int:
        most = min(self.settings.max_new_tokens, self.n_ctx)
        highest = LARGEST_LENGTH if self.is_lenient else most
        new = self.one_of(LENGTH_NAMES, 0, highest, min(default, room))
        if self.is_lenient:
            return min(new, most, room)
        if new > room:
            message = f"the context of {self.n_ctx} tokens has room for {room} new ones, not {new}"
            raise Refusal(message, code=TOO_LONG)
        return new


def is_context(value: Any) -> bool:
    """What the original's API answers: a text, or a list of turns."""
    return is_text(value) or is_list(value, is_text, MOST_TURNS)


def is_options(value: Any) -> bool:
    """Whether it can be OpenAI's stream_options."""
    return isinstance(value, dict) and type(value.get("include_usage")) in (bool, type(None))


def is_text_part(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("text"))


def read_message(message: Any) -> tuple[int, str] | None:
    """The speaker and the text of one of OpenAI's messages; the text may come in parts.

    An assistant's message without content says nothing: None.
    """
    fields: dict[str, Any] = message if isinstance(message, dict) else {}
    role: Any = fields.get("role")
    content: Any = fields.get("content")
    if role == "assistant" and content in (None, []):
        return None
    if is_list(content, is_text_part):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or role not in SPEAKERS or not is_text(content):
        raise Refusal(
            f"a message wants a role among {', '.join(SPEAKERS)}, and text as content: "
            "this model sees no images, hears nothing and calls no tools",
            param="messages",
        )
    return SPEAKERS[role], content
