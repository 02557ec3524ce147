"""A request of token ids on its way: requested, queued, decoded, answered.

`check_request` decides which requests can be served at all.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from gptchat.inference.draw import Row, Scored
from gptchat.inference.sampling import Sampling
from gptchat.model.gpt2 import NO_TYPE_ROWS, GPT2Config

Ids = Sequence[int]


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it. Drawn tokens have the type of the prompt's last one.

    `token_type_ids` is as long as `input_ids`; None adds no types, which is not type 0. One of
    `stop_ids` ends the answer and is no part of it. `score_prompt` asks for `prompt_logprobs`.
    """

    input_ids: Ids
    token_type_ids: Ids | None = None
    sampling: Sampling = Sampling()
    n: int = 1  # candidates
    stop_ids: Ids = ()
    score_prompt: bool = False

    @property
    def types(self) -> Ids:
        """`token_type_ids`, or () for None."""
        return self.token_type_ids or ()


@dataclass
class Output:
    """What a step gives a candidate: what was drawn, the reason why it has ended, or both.

    `finish_reason` is "stop" (a stop id, or nothing left to draw), "length", or None if it goes on.
    A request's first output has `n_cached`, the number of prompt tokens found in the cache, and
    `prompt_logprobs` if requested: one entry per token, the first without a log-probability.
    """

    request_id: int
    candidate: int
    scored: Scored | None = None  # also of a stop id
    finish_reason: str | None = None
    prompt_logprobs: list[Scored] | None = None
    n_cached: int = 0

    @property
    def token(self) -> int | None:
        """The next id of the answer, or None if it has already ended."""
        if self.scored is None or self.finish_reason == "stop":
            return None
        return self.scored.token


@dataclass(kw_only=True)
class Candidate(Row):
    """One candidate of a request while it is decoded. `ids` are its prompt and answer so far."""

    ids: array  # of int64, which numpy reads without a copy
    request_id: int
    request: Request
    max_length: int  # of ids, prompt and answer together

    @property
    def cached(self) -> tuple[Ids, Ids]:
        """Ids and types of what is in the cache; types are [] if the request has none."""
        ids, types = self.ids[:-1].tolist(), list(self.request.types)
        types += types[-1:] * (len(ids) - len(types))  # of the drawn ids
        return ids, types[: len(ids)]

    def take(self, drawn: Scored) -> Output:
        """The output for a drawn token, which is appended unless the candidate ends before it."""
        output = Output(self.request_id, self.candidate)
        if len(self.ids) < self.max_length:  # false if max_new_tokens is 0
            if drawn.token >= 0:
                output.scored = drawn
            if drawn.token < 0 or drawn.token in self.stop_ids:
                output.finish_reason = "stop"
                return output
            self.ids.append(drawn.token)
        if len(self.ids) >= self.max_length:
            output.finish_reason = "length"
        return output


@dataclass
class QueuedRequest:
    """A request in the queue, and its candidates, which share a prefill."""

    request: Request
    candidates: list[Candidate]
    n_prefilled: int = 0  # tokens of its prompt in the cache
    n_cached: int = 0  # of these, found in the cache
    prompt_logprobs: list[Scored] = field(default_factory=list)

    @property
    def is_prefilled(self) -> bool:
        return self.n_prefilled == len(self.request.input_ids)

    def next_chunk(self, size: int) -> tuple[Ids, Ids]:
        """Ids and types of at most `size` next prompt tokens; () for no types."""
        chunk = slice(self.n_prefilled, self.n_prefilled + size)
        return self.request.input_ids[chunk], self.request.types[chunk]


def check_request(request: Request, slots: int, length: int, config: GPT2Config) -> None:
    """Raise ValueError with the reason if the request could never be served."""
    ids = request.input_ids
    types = request.token_type_ids
    vocab_size = config.vocab_size
    longest = length - 1 if request.sampling.max_new_tokens else length
    if not 1 <= len(ids) <= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, wanted from 1 to {longest}")
    for name, some_ids in (
        ("id", ids),
        ("stop id", request.stop_ids),
        ("logit_bias of id", request.sampling.logit_bias),
    ):
        for id in some_ids:
            if type(id) is not int:  # a float would end the pass of all requests
                raise ValueError(f"{name} {id!r} is no int")
            if not 0 <= id < vocab_size:
                raise ValueError(f"{name} {id} is not in the vocabulary of {vocab_size} entries")
    if types is not None and config.type_rows == NO_TYPE_ROWS:
        raise ValueError("the model has no rows for token types, wanted token_type_ids None")
    if types is not None and (len(types) != len(ids) or not set(types) <= {0, 1}):
        raise ValueError(
            f"token_type_ids must be {len(ids)} numbers 0 or 1, one for each of the prompt's tokens"
        )
    if type(request.n) is not int or not 1 <= request.n <= slots:
        raise ValueError(f"n is {request.n}, wanted from 1 to {slots}, the number of slots")
