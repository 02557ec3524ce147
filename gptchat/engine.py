"""Many sequences at once: slots of a KV cache that requests join and leave between steps. Token ids in, token ids out.

A step gives every live sequence its next token, in one pass over all of them, then prefills a piece of the waiting
prompts, first come first served; a prompt that is complete draws its first token. The n candidates of a request share
its prefill and are admitted together.

Live sequences stand in the slots 0..n-1, each from position 0 of its slot, so that a pass sees a view of the cache, as
far as the longest of them reaches. Where one leaves, the last one is copied into its slot; the prompt in work stands in
the slot after them. An engine is for one thread.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptchat.linear import prepare
from gptchat.model import GPT2, KVCache
from gptchat.sampling import Row, Sampling, Scored, draw, score

SCORED_AT_ONCE = 32  # prompt positions whose logits (x V) are in memory together


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of it. What is drawn has the type of the prompt's last token."""

    input_ids: Sequence[int]
    token_type_ids: Sequence[int] | None = None
    sampling: Sampling = Sampling()
    n: int = 1  # candidates
    stop_ids: Sequence[int] = ()  # drawing one ends the answer; it is not emitted
    score_prompt: bool = False


@dataclass
class Output:
    """What a step has to say about a candidate: a token, or the reason why there is no further one, or both.

    `prompt_logprobs` comes with a request's first output: an entry per token, the first one's without a log-probability.
    """

    request_id: int
    candidate: int
    token: int | None = None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None  # "stop" (or nothing was left to draw), "length"
    prompt_logprobs: list[Scored] | None = None


@dataclass
class Job:
    """A request that waits, or whose first `done` prompt tokens are in the cache."""

    id: int
    request: Request
    candidates: list[int]
    done: int = 0
    scored: list[Scored] = field(default_factory=list)


@dataclass
class Live(Row):
    """A live sequence: the candidate in a slot. All its ids but the last are in the cache."""

    request_id: int
    request: Request
    full: int  # this long is long enough


class Engine:
    """Generates with `model` as it is now, packed for `dtype` (the model itself stays fit for training), in `slots` slots
    of `length` positions. `suppress` are ids that are never drawn. A step prefills at most `prefill_chunk` prompt tokens,
    so that long prompts do not stall the live sequences.
    """

    def __init__(self, model: GPT2, slots: int = 8, length: int | None = None, dtype: str = "float32",
                 suppress: Sequence[int] = (), prefill_chunk: int = 256):
        self.model = deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()  # shared
        prepare(self.model, dtype)
        self.slots, self.suppress, self.prefill_chunk = slots, tuple(suppress), prefill_chunk
        self.length = min(length or model.config.n_positions, model.config.n_positions)
        self.device = self.model.wte.weight.device
        self.cache = KVCache(model.config, slots, self.length, self.model.wte.weight.dtype, self.device)
        self.waiting: deque[Job] = deque()
        self.prefilling: Job | None = None
        self.running: list[Live] = []  # in the order of their slots
        self.submitted = 0
        self.typed: bool | None = None  # whether requests come with token types

    @property
    def live(self) -> int:
        """Slots in use."""
        return len(self.running) + (len(self.prefilling.candidates) if self.prefilling else 0)

    @property
    def queued(self) -> int:
        """Requests that have no slot yet."""
        return len(self.waiting)

    @property
    def idle(self) -> bool:
        return not self.live and not self.queued

    def submit(self, request: Request) -> int:
        """Queue a request; its id. Raises ValueError with the reason if it could never be served."""
        check(request, self.slots, self.length, self.model.config.vocab_size)
        if self.typed not in (None, request.token_type_ids is not None):
            raise ValueError("requests with and without token types cannot share an engine")
        self.typed = request.token_type_ids is not None
        self.submitted += 1
        self.waiting.append(Job(self.submitted, request, list(range(request.n))))
        return self.submitted

    def cancel(self, request_id: int, candidate: int | None = None) -> None:
        """Forget a request, or one of its candidates, and free its slots. One that has ended is no error."""
        for slot in reversed(range(len(self.running))):
            row = self.running[slot]
            if row.request_id == request_id and candidate in (None, row.candidate):
                self._free(slot)
        for job in [*self.waiting, *([self.prefilling] if self.prefilling else [])]:
            if job.id == request_id:
                job.candidates = [c for c in job.candidates if candidate not in (None, c)]
        self.waiting = deque(job for job in self.waiting if job.candidates)
        if self.prefilling and not self.prefilling.candidates:
            self.prefilling = None

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """At most one token for each candidate that has a slot."""
        return self._decode() + self._prefill()

    def _decode(self) -> list[Output]:
        if not self.running:
            return []
        types = [row.request.token_type_ids for row in self.running]
        hidden = self._run([row.ids[-1:] for row in self.running],
                           None if types[0] is None else [t[-1:] for t in types if t],
                           first=0, start=[len(row.ids) - 1 for row in self.running])
        return self._draw(0, self.model.logits(hidden[:, -1]))

    def _prefill(self) -> list[Output]:
        """A piece of the prompt in work, then the waiting prompts that fit whole into what is left of the chunk."""
        outputs: list[Output] = []
        left = self.prefill_chunk
        while (job := self._next_job()) and (left == self.prefill_chunk or len(job.request.input_ids) <= left):
            piece = slice(job.done, job.done + left)
            ids, types = job.request.input_ids[piece], job.request.token_type_ids
            hidden = self._run([ids], [types[piece]] if types else None, first=len(self.running), start=[job.done])
            if job.request.score_prompt:
                job.scored += self._score(job, hidden[0])
            job.done += len(ids)
            left -= len(ids)
            if job.done == len(job.request.input_ids):
                outputs += self._begin(job, hidden[:, -1])
        return outputs

    def _next_job(self) -> Job | None:
        """The job in work; if there is none, the first in the queue, once there are slots for all its candidates."""
        if not self.prefilling and self.waiting and self.live + len(self.waiting[0].candidates) <= self.slots:
            self.prefilling = self.waiting.popleft()
        return self.prefilling

    def _run(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, first: int,
             start: list[int]) -> Tensor:
        """Hidden states (n, T, C) of new tokens (n, T) in the slots from `first` on, at the positions from `start`."""
        view = self.cache.view(first, torch.tensor(start, device=self.device), len(ids[0]), max(start) + len(ids[0]))
        return self.model(torch.tensor(ids, device=self.device),
                          None if types is None else torch.tensor(types, device=self.device), cache=view)

    def _score(self, job: Job, hidden: Tensor) -> list[Scored]:
        """The prompt's tokens scored by a piece's hidden states (T, C), each of which foretells the token after it."""
        wanted = torch.tensor(job.request.input_ids[job.done + 1 : job.done + 1 + len(hidden)], device=self.device)
        scored = [] if job.done else [Scored(job.request.input_ids[0])]
        for some, ids in zip(hidden[: len(wanted)].split(SCORED_AT_ONCE), wanted.split(SCORED_AT_ONCE), strict=True):
            scored += score(self.model.logits(some), ids, job.request.sampling.logprobs or 0)
        return scored

    def _begin(self, job: Job, hidden: Tensor) -> list[Output]:
        """The job, whose prompt is complete and ends in `hidden` (1, C), becomes sequences with their first token."""
        self.prefilling = None
        first, prompt, sampling = len(self.running), job.request.input_ids, job.request.sampling
        if sampling.max_new_tokens:
            for slot in range(first + 1, first + len(job.candidates)):
                self._copy(first, slot, len(prompt))
            full = min(len(prompt) + sampling.max_new_tokens, self.length)
            self.running += [Live(sampling, c, list(prompt), job.id, job.request, full) for c in job.candidates]
            outputs = self._draw(first, self.model.logits(hidden).repeat(len(job.candidates), 1))
        else:
            outputs = [Output(job.id, candidate, finish_reason="length") for candidate in job.candidates]
        outputs[0].prompt_logprobs = job.scored if job.request.score_prompt else None
        return outputs

    def _draw(self, first: int, logits: Tensor) -> list[Output]:
        """The next token of the live sequences in the slots from `first` on; those that end leave."""
        rows = self.running[first:]
        outputs = [_accept(row, scored) for row, scored in zip(rows, draw(logits, rows, self.suppress), strict=True)]
        for slot in reversed(range(len(outputs))):
            if outputs[slot].finish_reason:
                self._free(first + slot)
        return outputs

    def _free(self, slot: int) -> None:
        """Take the sequence out of its slot; the last one, and the prompt in work, move up."""
        last = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = last
            self._copy(len(self.running), slot, len(last.ids))
        if self.prefilling:
            self._copy(len(self.running) + 1, len(self.running), self.prefilling.done)

    def _copy(self, source: int, to: int, length: int) -> None:
        for part in (self.cache.k, self.cache.v):
            part[:, to, :, :length] = part[:, source, :, :length]


def _accept(row: Live, drawn: Scored) -> Output:
    """Append the drawn token to its sequence, unless it ends there."""
    if drawn.token < 0 or drawn.token in row.request.stop_ids:
        return Output(row.request_id, row.candidate, finish_reason="stop")
    row.ids.append(drawn.token)
    reason = "length" if len(row.ids) >= row.full else None
    return Output(row.request_id, row.candidate, *drawn, finish_reason=reason)


def check(request: Request, slots: int, length: int, vocab_size: int) -> None:
    """Raise ValueError with the reason if the request could never be served."""
    ids, types, sampling = request.input_ids, request.token_type_ids, request.sampling
    longest = length - 1 if sampling.max_new_tokens else length
    outside = [i for i in (*ids, *(i for word in sampling.bad_words_ids for i in word)) if not 0 <= i < vocab_size]
    if not ids:
        raise ValueError("the prompt is empty")
    if len(ids) > longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, at most {longest} fit")
    if outside:
        raise ValueError(f"id {outside[0]} is not in the vocabulary of {vocab_size} entries")
    if types is not None and (len(types) != len(ids) or not set(types) <= {0, 1}):
        raise ValueError(f"token_type_ids must be {len(ids)} numbers 0 or 1, one for each of the prompt's tokens")
    if not 1 <= request.n <= slots:
        raise ValueError(f"n is {request.n}, wanted from 1 to {slots}, the number of slots")


@dataclass
class Completion:
    """All outputs of one candidate."""

    ids: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish_reason: str = ""
    prompt_logprobs: list[Scored] | None = None


def generate(engine: Engine, requests: Iterable[Request]) -> list[list[Completion]]:
    """Serve the requests, through all slots; of each one its candidates, in order."""
    answers: dict[int, list[Completion]] = {}
    for request in requests:
        answers[engine.submit(request)] = [Completion() for _ in range(request.n)]
    while not engine.idle:
        for output in engine.step():
            answer = answers[output.request_id][output.candidate]
            answer.prompt_logprobs = output.prompt_logprobs or answer.prompt_logprobs
            answer.finish_reason = output.finish_reason or ""
            if output.token is not None:
                answer.ids.append(output.token)
                answer.scored.append(Scored(output.token, output.logprob, output.top))
    return list(answers.values())
