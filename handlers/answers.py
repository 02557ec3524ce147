"""From the engine's outputs to what a client reads: one JSON object at the end, or events.

An `Answer` is one HTTP request from arrival to last chunk. It has a `page` (the ready answer to a
GET), a `generation` or an `error`, which may also end a generation. Each API is a `Generation`.

Invariants: the pieces of a stream, joined, are the whole text. The last event of each choice
carries its finish reason. An error has OpenAI's shape, as an event of a stream or as the body.
"""

import json
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from msgspec import Struct, to_builtins

from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.draw import Scored
from gptchat.inference.engine import Output, Request
from gptchat.inference.generate import CandidateText
from gptchat.inference.text import StreamDecoder
from handlers.body import Refusal
from handlers.loop import Ticket
from handlers.served_model import ServedModel
from handlers.settings import Plan, words

JSON = "application/json"
EVENTS = "text/event-stream"
LAST_EVENT = "data: [DONE]\n\n"


class ErrorDetails(Struct):
    """What OpenAI's clients read of an error."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class Error(Struct):
    """The answer to a request that cannot be served, in every API."""

    error: ErrorDetails


class ScoredToken(NamedTuple):
    """A token with its log-probabilities, and the place in the text where it begins."""

    offset: int
    scored: Scored


class Choice(CandidateText):
    """A candidate's text and log-probabilities, and how much of both has been sent."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], beginning: Sequence[int], echo: str
    ):
        super().__init__(tokenizer, stop, beginning, echo)
        self.index = 0  # in the answer
        self.tokens: list[ScoredToken] = []
        self.n_text_sent = 0  # characters
        self.n_tokens_sent = 0
        self.end_sent = False  # and with it the finish reason

    def take(self, output: Output) -> str:
        if output.scored and output.token is not None and not self.finish_reason:
            self.tokens.append(ScoredToken(self.n_decoded, output.scored))
        return super().take(output)

    @property
    def sent_nothing(self) -> bool:
        return not self.n_text_sent and not self.end_sent

    @property
    def unsent_text(self) -> str:
        return self.text[self.n_text_sent :]

    @property
    def unsent_tokens(self) -> list[ScoredToken]:
        return self.tokens[self.n_tokens_sent :]

    @property
    def has_news(self) -> bool:
        return bool(self.unsent_text) or bool(self.finish_reason) and not self.end_sent

    def mark_sent(self) -> None:
        self.n_text_sent = len(self.text)
        self.n_tokens_sent = len(self.tokens)
        self.end_sent = bool(self.finish_reason)


class Generation:
    """What is generated for one request: n choices for each prompt, out of `plan.best_of`.

    If a choice is to be made, `rank` runs on the decode thread once all candidates of a prompt have
    ended; a stream then sends each chosen text at once.

    A subclass is an API. `declare` gives its request's declaration; its constructor turns a checked
    body (`asked`) into requests for the engine, or raises Refusal.
    """

    kind: ClassVar[str]  # of the metrics
    path: ClassVar[str]  # after /predictions/NAME/1.0/
    whole_answer: ClassVar[type[Struct]]
    chunk: ClassVar[type[Struct]]  # an event
    ranks_all: ClassVar[bool] = False  # also if all candidates are given

    def __init__(
        self,
        model: ServedModel,
        id: str,
        asked: Any,
        plan: Plan,
        requests: Sequence[Request],
        beginning: Sequence[int] = (),
        echo: bool = False,
    ):
        self.model = model
        self.id = id
        self.asked = asked
        self.requests = requests
        self.n: int = asked.n  # choices for each prompt
        self.pick = plan.pick
        self.logprobs = plan.logprobs  # that the client asked for
        self.echoes = echo  # the prompt's text comes before the answer
        self.began = time.monotonic()
        self.created = int(time.time())
        self.first_token = 0.0  # time.monotonic(), as `began`; 0: none yet
        self.n_cached = 0  # prompt tokens that the engine had in its cache
        self.frame_bytes = 500  # at most what the answer's JSON has besides its tokens
        self.tokenizer = model.generator.tokenizer
        self.candidates: list[list[Choice]] = []  # of each prompt
        for request in requests:
            text = self.tokenizer.decode(list(request.input_ids)) if echo else ""
            drawn = [
                Choice(self.tokenizer, words(asked.stop), beginning, text)
                for _ in range(plan.best_of)
            ]
            self.candidates.append(drawn)
        self.given: list[list[Choice]] = [[] for _ in requests]  # choices of each prompt
        self.best: list[Choice] = [drawn[0] for drawn in self.candidates]
        self.ranks = plan.best_of > self.n or (self.ranks_all and self.n > 1)
        if not self.ranks:
            for prompt in range(len(requests)):
                self.choose(prompt, list(range(self.n)))

    @classmethod
    def declare(cls, model: ServedModel) -> type[Struct]:
        raise NotImplementedError

    @property
    def choices(self) -> list[Choice]:
        return [choice for choices in self.given for choice in choices]

    @property
    def done(self) -> bool:
        return all(self.given) and all(choice.finish_reason for choice in self.choices)

    @property
    def n_prompt_tokens(self) -> int:
        return sum(len(request.input_ids) for request in self.requests)

    @property
    def n_new_tokens(self) -> int:
        return sum(choice.n_tokens for choice in self.choices)

    @property
    def n_drawn_tokens(self) -> int:
        return sum(choice.n_tokens for drawn in self.candidates for choice in drawn)

    def take(self, prompt: int, output: Output) -> bool:
        """Add an output. True if a stop string, of which the engine knows nothing, has just ended
        the candidate."""
        self.n_cached += output.n_cached
        if output.prompt_logprobs:
            self._take_prompt_scores(prompt, output.prompt_logprobs)
        if output.token is not None and not self.first_token:
            self.first_token = time.monotonic()
        choice = self.candidates[prompt][output.candidate]
        choice.take(output)
        return choice.must_cancel

    def _take_prompt_scores(self, prompt: int, scores: list[Scored]) -> None:
        decoder = StreamDecoder(self.tokenizer)
        offset = 0
        for scored in scores:
            for choice in self.candidates[prompt]:
                choice.tokens.append(ScoredToken(offset, scored))
            offset += len(decoder.push(scored.token))

    def is_to_rank(self, prompt: int) -> bool:
        """Whether a choice is to be made, and all candidates have ended."""
        drawn = self.candidates[prompt]
        return self.ranks and all(choice.finish_reason for choice in drawn)

    def rank(self, prompt: int) -> list[int]:
        """The numbers of a prompt's candidates, best first. May run the model."""
        generator = self.model.generator
        return generator.rank(self.pick, self.requests[prompt], self.candidates[prompt])

    def choose(self, prompt: int, ranking: list[int]) -> None:
        """Give the first n of a ranking. If all are given, they keep the order of drawing."""
        if self.given[prompt]:
            return
        drawn = self.candidates[prompt]
        self.best[prompt] = drawn[ranking[0]]
        chosen = ranking[: self.n] if len(drawn) > self.n else range(self.n)
        for index, number in enumerate(chosen, prompt * self.n):
            drawn[number].index = index
            self.given[prompt].append(drawn[number])

    def events(self) -> list[Struct]:
        events = []
        for choice in self.choices:
            if choice.has_news:
                events.append(self.event(choice))
                choice.mark_sent()
        if self.done:
            events += self.last_events()
        return events

    def event(self, choice: Choice) -> Struct:
        raise NotImplementedError

    def last_events(self) -> list[Struct]:
        """What follows when all choices have ended."""
        raise NotImplementedError

    def whole(self) -> Struct:
        raise NotImplementedError


class Page(NamedTuple):
    content_type: str
    text: str


class Answer:
    """One HTTP request. The first `drain` settles status and content type, which are sent with the
    first chunk; page, generation or error must be set by then."""

    def __init__(self, id: str):
        self.id = id
        self.began = time.monotonic()
        self.page: Page | None = None
        self.generation: Generation | None = None
        self.error: Refusal | None = None
        self.tickets: list[Ticket] = []  # the requests to the engine for it
        self.status = 0  # not settled yet
        self.content_type = JSON

    @property
    def done(self) -> bool:
        return bool(self.error) or self.generation is None or self.generation.done

    def drain(self) -> str:
        """What is to be sent now, "" for nothing."""
        if not self.status:
            self._settle()
        if self.page:
            return self.page.text
        bodies = [to_json(body) for body in self._bodies()]
        if self.content_type != EVENTS:
            return "".join(bodies)
        events = "".join(f"data: {body}\n\n" for body in bodies)
        return events + LAST_EVENT if self.done else events

    def _settle(self) -> None:
        self.status = self.error.status if self.error else 200
        if self.page:
            self.content_type = self.page.content_type
        elif self.generation and self.generation.asked.stream and not self.error:
            self.content_type = EVENTS

    def _bodies(self) -> list[Struct]:
        """A stream's new events; otherwise the one body, once it is whole."""
        if self.error:
            return [error_body(self.error)]
        if self.generation is None:
            return []
        if self.content_type == EVENTS:
            return self.generation.events()
        return [self.generation.whole()] if self.generation.done else []


def to_json(body: Any) -> str:
    """JSON in ASCII, so that no client or proxy can decode it wrongly."""
    return json.dumps(to_builtins(body))


def error_body(refusal: Refusal) -> Error:
    kind: Any = "invalid_request_error" if refusal.status < 500 else "server_error"
    return Error(ErrorDetails(refusal.message, kind, refusal.param, refusal.code))
