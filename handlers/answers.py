"""What the engine says of a job -> what its client reads: one JSON object at the end, or events on
the way.

An `Answer` is one HTTP request from its arrival to its last chunk. It has a `page` (the ready
answer to a GET), or a `generation` (what is being generated for a job), or an `error`, which may
also end a generation. `drain` gives what is to be sent now; its first call settles status and
content type, since they go out with the first chunk.

Invariants: a text is sent once, piece after piece, and the pieces joined are the whole text. The
last event of each choice carries its finish reason. A streamed error comes as an event, any other
error as the body, in OpenAI's shape.
"""

import json
import time
from typing import Any, NamedTuple

from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.draw import Scored
from gptchat.inference.engine import Output
from gptchat.inference.generate import CandidateText
from gptchat.inference.rerank import pick_median
from gptchat.inference.text import StreamDecoder
from handlers.fields import Refusal
from handlers.jobs import Job
from handlers.loop import Ticket
from handlers.served_model import ServedModel

JSON = "application/json"
EVENTS = "text/event-stream"
LAST_EVENT = "data: [DONE]\n\n"
# OpenAI's words, by the kind of job
ID_PREFIXES = {"completions": "cmpl", "chat": "chatcmpl"}
WHOLE_OBJECTS = {"completions": "text_completion", "chat": "chat.completion"}
STREAMED_OBJECTS = {"completions": "text_completion", "chat": "chat.completion.chunk"}


class ScoredToken(NamedTuple):
    """A token with its log-probabilities, and the place in the text where it begins."""

    offset: int
    scored: Scored


class Choice(CandidateText):
    """A candidate's text and log-probabilities, and how much of both has been sent."""

    def __init__(self, tokenizer: Tokenizer, job: Job, index: int):
        super().__init__(tokenizer, job.stop, job.beginning)
        if job.echo:
            prompt = job.requests[index // job.n].input_ids
            self.text = tokenizer.decode(prompt) + self.text
        self.index = index
        self.tokens: list[ScoredToken] = []
        self.n_text_sent = 0  # characters
        self.n_tokens_sent = 0
        self.end_sent = False  # and with it the finish reason

    def take(self, output: Output) -> str:
        if output.token is not None and not self.finish_reason:
            scored = Scored(output.token, output.logprob, output.top)
            self.tokens.append(ScoredToken(len(self.text), scored))
        return super().take(output)

    @property
    def sent_nothing(self) -> bool:
        return not self.n_text_sent and not self.end_sent

    @property
    def has_news(self) -> bool:
        if len(self.text) > self.n_text_sent:
            return True
        return bool(self.finish_reason) and not self.end_sent

    def mark_sent(self) -> None:
        self.n_text_sent = len(self.text)
        self.n_tokens_sent = len(self.tokens)
        self.end_sent = bool(self.finish_reason)


class Generation:
    """What is generated for a job: n choices for each prompt. Each API's JSON has a subclass."""

    def __init__(self, model: ServedModel, job: Job, id: str, began: float):
        self.model = model
        self.job = job
        self.id = id
        self.began = began
        self.created = int(time.time())
        self.first_token = 0.0  # time.monotonic(), as `began`; 0: none yet
        self.n_cached = 0  # prompt tokens that the engine had in its cache
        self.tokenizer = model.generator.tokenizer
        n_choices = len(job.requests) * job.n
        self.choices = [Choice(self.tokenizer, job, index) for index in range(n_choices)]

    @property
    def done(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(len(request.input_ids) for request in self.job.requests)
        new = sum(choice.n_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def take(self, prompt: int, output: Output) -> bool:
        """Add an output of the request for prompt number `prompt`.

        True if a stop string has just ended the candidate, which the engine cannot know.
        """
        self.n_cached += output.n_cached
        if output.prompt_logprobs:
            self._take_prompt_scores(prompt, output.prompt_logprobs)
        if output.token is not None and not self.first_token:
            self.first_token = time.monotonic()
        choice = self.choices[prompt * self.job.n + output.candidate]
        choice.take(output)
        return choice.must_cancel

    def _take_prompt_scores(self, prompt: int, scores: list[Scored]) -> None:
        decoder = StreamDecoder(self.tokenizer)
        offset = 0
        first = prompt * self.job.n
        for scored in scores:
            for choice in self.choices[first : first + self.job.n]:
                choice.tokens.append(ScoredToken(offset, scored))
            offset += len(decoder.push(scored.token))

    def events(self) -> list[Any]:
        """What a stream sends now."""
        events = []
        for choice in self.choices:
            if choice.has_news:
                events.append(self.event(choice))
                choice.mark_sent()
        if self.done:
            events += self.last_events()
        return events

    def event(self, choice: Choice) -> Any:
        """What a choice has not sent yet, as an event."""
        raise NotImplementedError

    def last_events(self) -> list[Any]:
        """What follows when all choices have ended."""
        raise NotImplementedError

    def whole(self) -> Any:
        """The answer that is not streamed."""
        raise NotImplementedError


class OriginalGeneration(Generation):
    """In the shape of the original program's API."""

    def event(self, choice: Choice) -> Any:
        return {"token": choice.text[choice.n_text_sent :]}

    def last_events(self) -> list[Any]:
        return [self.whole()]

    def whole(self) -> Any:
        now = time.monotonic()
        texts = [choice.text for choice in self.choices]
        return {
            "response": pick_median(texts),
            "request": self.job.original_request,
            "model_info": {
                "model": self.model.name,
                "output": texts,
                "finish_reason": [choice.finish_reason for choice in self.choices],
                "prompt_tokens": self.usage["prompt_tokens"],
                "seed": self.job.sampling.seed,
                "completion_tokens": [choice.n_tokens for choice in self.choices],
                "seconds": round(now - self.began, 4),
                "first_token_seconds": round((self.first_token or now) - self.began, 4),
            },
        }


class OpenAIGeneration(Generation):
    """In the shape of OpenAI's completions and chat completions."""

    def event(self, choice: Choice) -> Any:
        content: dict[str, Any] = {"text": choice.text[choice.n_text_sent :]}
        if self.job.kind == "chat":
            delta = {"role": "assistant"} if choice.sent_nothing else {}
            content = {"delta": delta | {"content": content["text"]}}
        shaped = self._shape(choice, content, choice.tokens[choice.n_tokens_sent :])
        return self._frame([shaped], STREAMED_OBJECTS)

    def last_events(self) -> list[Any]:
        if not self.job.include_usage:
            return []
        return [self._frame([], STREAMED_OBJECTS) | {"usage": self.usage}]

    def whole(self) -> Any:
        shaped = []
        for choice in self.choices:
            content: dict[str, Any] = {"text": choice.text}
            if self.job.kind == "chat":
                content = {"message": {"role": "assistant", "content": choice.text}}
            shaped.append(self._shape(choice, content, choice.tokens))
        return self._frame(shaped, WHOLE_OBJECTS) | {"usage": self.usage}

    def _frame(self, choices: list[Any], objects: dict[str, str]) -> dict[str, Any]:
        frame = {
            "id": f"{ID_PREFIXES[self.job.kind]}-{self.id}",
            "object": objects[self.job.kind],
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }
        if self.job.include_usage:
            frame["usage"] = None  # OpenAI's chunks have it, null up to the last one
        return frame

    def _shape(
        self, choice: Choice, content: dict[str, Any], tokens: list[ScoredToken]
    ) -> dict[str, Any]:
        """A choice around its content, with the log-probabilities of `tokens` if asked for."""
        logprobs = None
        if self.job.sampling.logprobs is not None:
            shape = chat_logprobs if self.job.kind == "chat" else completion_logprobs
            logprobs = shape(self.tokenizer, tokens)
        return {
            "index": choice.index,
            **content,
            "finish_reason": choice.finish_reason or None,
            "logprobs": logprobs,
        }


def chat_logprobs(tokenizer: Tokenizer, tokens: list[ScoredToken]) -> dict[str, Any]:
    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        raw = list(tokenizer.token_bytes[id])
        return {"token": token_name(tokenizer, id), "logprob": logprob, "bytes": raw}

    content = []
    for _, scored in tokens:
        best = [entry(id, logprob) for id, logprob in scored.top]
        content.append(entry(scored.token, scored.logprob) | {"top_logprobs": best})
    return {"content": content}


def completion_logprobs(tokenizer: Tokenizer, tokens: list[ScoredToken]) -> dict[str, Any]:
    """The text's first token has no log-probability; elsewhere the drawn one is among the best."""
    best_of_each: list[dict[str, float | None] | None] = []
    for _, scored in tokens:
        if scored.logprob is None:
            best_of_each.append(None)
            continue
        candidates = [*scored.top, (scored.token, scored.logprob)]
        best_of_each.append({token_name(tokenizer, id): logprob for id, logprob in candidates})
    return {
        "tokens": [token_name(tokenizer, scored.token) for _, scored in tokens],
        "text_offset": [offset for offset, _ in tokens],
        "token_logprobs": [scored.logprob for _, scored in tokens],
        "top_logprobs": best_of_each,
    }


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """A name that no other token has.

    It is the token's text, `bytes:\\xe3` for a part of a character, `[SEP]` for a special token.
    """
    raw = tokenizer.token_bytes[id]
    try:
        return raw.decode() or str(tokenizer.backend.id_to_token(id))
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class Page(NamedTuple):
    """The ready answer to a GET."""

    content_type: str
    text: str


class Answer:
    """One HTTP request. Page, generation or error is set before the first `drain`."""

    def __init__(self, id: str):
        self.id = id
        self.began = time.monotonic()
        self.page: Page | None = None
        self.generation: Generation | None = None
        self.error: Refusal | None = None
        self.tickets: list[Ticket] = []  # the requests to the engine for it
        self.started = False  # whether the first chunk is out; it settles the next three
        self.status = 200
        self.content_type = JSON
        self.streams = False

    def begin(self, model: ServedModel, job: Job) -> None:
        """Answer a job."""
        shape = OriginalGeneration if job.kind == "original" else OpenAIGeneration
        self.generation = shape(model, job, self.id, self.began)

    @property
    def done(self) -> bool:
        if self.error or self.generation is None:
            return True
        return self.generation.done

    def drain(self) -> str:
        """What is to be sent now, "" for nothing."""
        if not self.started:
            self._start()
        if self.page:
            return self.page.text
        bodies = [json.dumps(body) for body in self._bodies()]
        if not self.streams:
            return "".join(bodies)
        events = "".join(f"data: {body}\n\n" for body in bodies)
        return events + LAST_EVENT if self.done else events

    def _start(self) -> None:
        """Settle what goes out with the first chunk."""
        self.started = True
        if self.error:
            self.status = self.error.status
        elif self.generation and self.generation.job.stream:
            self.streams = True
            self.content_type = EVENTS
        if self.page:
            self.content_type = self.page.content_type

    def _bodies(self) -> list[Any]:
        """A stream's new events; otherwise the one body, once it is whole."""
        if self.error:
            return [error_body(self.error)]
        if self.generation is None:
            return []
        if self.streams:
            return self.generation.events()
        return [self.generation.whole()] if self.generation.done else []


def error_body(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's shape, for every API."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    return {
        "error": {
            "message": refusal.message,
            "type": kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def model_list(name: str, path: str) -> dict[str, Any]:
    """The answer to GET v1/models and v1/models/NAME."""
    if path not in ("v1/models", f"v1/models/{name}"):
        raise Refusal(f"no such model: this is {name}", 404, "model", "model_not_found")
    model = {"id": name, "object": "model", "created": 0, "owned_by": "gptchat"}
    if path == "v1/models":
        return {"object": "list", "data": [model]}
    return model
