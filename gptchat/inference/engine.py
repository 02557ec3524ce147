"""Many sequences at once: slots of a KV cache that requests join and leave between steps. Token ids in, token ids out.

A step gives every live sequence its next token, in one pass over all of them, then prefills the next prompts of the
queue, a chunk of tokens at most: several short ones together, or a piece of a long one. A prompt that is complete draws
its first token. The n candidates of a request share its prefill and are admitted together.

Live sequences stand in the slots 0..n-1, each from position 0 of its slot, so that a pass sees a view of the cache, as
far as the longest of them reaches. Where one leaves, the last one is copied into its slot; the prompt in work stands in
the slot after them. An engine is for one thread.
"""

from collections import abc, deque
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptchat.inference.linear import prepare_for_inference, without_torch_function
from gptchat.inference.sampling import Row, Sampling, Scored, draw, score
from gptchat.model.gpt2 import GPT2

Ids = abc.Sequence[int]
SCORED_AT_ONCE = 32  # prompt positions whose logits (x V) are in memory together


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of it. What is drawn has the type of the prompt's last token."""

    input_ids: Ids
    token_type_ids: Ids | None = None
    sampling: Sampling = Sampling()
    n: int = 1  # candidates
    stop_ids: Ids = ()  # drawing one ends the answer; it is not emitted
    score_prompt: bool = False


@dataclass
class Output:
    """What a step has to say about a candidate: a token, or the reason why there is no further one, or both.

    `prompt_logprobs` comes with a request's first output: an entry per token, the first one without a log-probability.
    """

    request_id: int
    candidate: int
    token: int | None = None
    logprob: float | None = None
    top: abc.Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None  # "stop" (or nothing was left to draw), "length"
    prompt_logprobs: list[Scored] | None = None


@dataclass
class Sequence(Row):
    """A live sequence: the candidate in a slot. All its ids but the last are in the cache."""

    request_id: int
    request: Request
    max_length: int  # so many ids are enough


@dataclass
class QueuedRequest:
    """A request in the queue, the sequences that it will become, and how many of its prompt tokens are in the cache."""

    request: Request
    rows: list[Sequence]
    done: int = 0
    scored: list[Scored] = field(default_factory=list)


class Engine:
    """Generates with `model` in `slots` slots of `length` positions. `dtype`, one of `linear.DTYPES`, packs a copy of
    its layers as they are now (the model itself stays fit for training); None takes them as they are. `suppress` are
    ids that are never drawn. A step prefills at most `prefill_chunk` prompt tokens, so that long prompts do not stall
    the live sequences."""

    def __init__(
        self,
        model: GPT2,
        slots: int = 8,
        length: int | None = None,
        dtype: str | None = None,
        suppress: abc.Sequence[int] = (),
        prefill_chunk: int = 256,
    ):
        self.model = deepcopy(
            model, {id(parameter): parameter for parameter in model.parameters()}
        ).eval()  # shared
        activations = prepare_for_inference(self.model, dtype) if dtype else model.wte.weight.dtype
        self.slots, self.prefill_chunk = slots, prefill_chunk
        self.length = min(length or model.config.n_positions, model.config.n_positions)
        self.device = self.model.wte.weight.device
        self.suppress = torch.tensor(suppress, dtype=torch.int64, device=self.device)
        self.cache = self.model.kv_cache(slots, self.length, activations)
        self.waiting: deque[QueuedRequest] = deque()  # only the first one's prompt may be in work
        self.running: list[Sequence] = []  # in the order of their slots
        self.submitted = 0
        self.typed: bool | None = None  # whether requests come with token types

    @property
    def live(self) -> int:
        """Slots in use."""
        return len(self.running) + (len(self.waiting[0].rows) if self._prefilling else 0)

    @property
    def queued(self) -> int:
        """Requests that have no slot yet."""
        return len(self.waiting) - bool(self._prefilling)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def _prefilling(self) -> int:
        """Tokens in the slot of the prompt in work."""
        return self.waiting[0].done if self.waiting else 0

    def submit(self, request: Request) -> int:
        """Queue a request; its id. Raises ValueError with the reason if it could never be served."""
        check(request, self.slots, self.length, self.model.config.vocab_size)
        if self.typed not in (None, request.token_type_ids is not None):
            raise ValueError("requests with and without token types cannot share an engine")
        self.typed = request.token_type_ids is not None
        self.submitted += 1
        prompt, sampling = request.input_ids, request.sampling
        max_length = min(len(prompt) + sampling.max_new_tokens, self.length)
        rows = [
            Sequence(sampling, c, list(prompt), self.submitted, request, max_length)
            for c in range(request.n)
        ]
        self.waiting.append(QueuedRequest(request, rows))
        return self.submitted

    def cancel(self, request_id: int, candidate: int | None = None) -> None:
        """Forget a request, or one of its candidates, and free its slots. One that has ended is no error."""
        for slot in reversed(range(len(self.running))):
            if (
                candidate in (None, self.running[slot].candidate)
                and self.running[slot].request_id == request_id
            ):
                self._free(slot)
        for job in self.waiting:
            job.rows = [
                r
                for r in job.rows
                if r.request_id != request_id or candidate not in (None, r.candidate)
            ]
        self.waiting = deque(job for job in self.waiting if job.rows)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """At most one token for each candidate that has a slot."""
        with without_torch_function():
            return self._decode() + self._prefill()

    def _decode(self) -> list[Output]:
        if not (rows := self.running):
            return []
        types = [(row.request.token_type_ids or ())[-1:] for row in rows]
        hidden = self._run(
            [row.ids[-1:] for row in rows], types, 0, [len(row.ids) - 1 for row in rows]
        )
        return self._draw(0, self.model.logits(hidden[:, -1]))

    def _prefill(self) -> list[Output]:
        """A piece of the prompt in work, or else all of the first waiting ones."""
        if not (jobs := self._admit()):
            return []
        pieces = [job.request.input_ids[job.done : job.done + self.prefill_chunk] for job in jobs]
        types = [
            (job.request.token_type_ids or ())[job.done : job.done + self.prefill_chunk]
            for job in jobs
        ]
        hidden = self._run(pieces, types, len(self.running), [job.done for job in jobs])
        for job, piece, states in zip(jobs, pieces, hidden, strict=True):
            if job.request.score_prompt:
                job.scored += self._score(job, states)
            job.done += len(piece)
        if jobs[0].done < len(jobs[0].request.input_ids):
            self.waiting.appendleft(jobs[0])
            return []
        return self._begin(jobs, hidden[range(len(jobs)), [len(piece) - 1 for piece in pieces]])

    def _admit(self) -> list[QueuedRequest]:
        """The prompt in work, or else the first in the queue, as many as there are slots for and one chunk holds."""
        jobs: list[QueuedRequest] = []
        longest, free = 0, self.slots - len(self.running)
        while self.waiting and (free := free - len(self.waiting[0].rows)) >= 0:
            longest = max(longest, len(self.waiting[0].request.input_ids))
            if jobs and longest * (len(jobs) + 1) > self.prefill_chunk:  # so one in work is alone
                break
            jobs.append(self.waiting.popleft())
        return jobs

    def _run(
        self, ids: abc.Sequence[Ids], types: abc.Sequence[Ids], first: int, start: list[int]
    ) -> Tensor:
        """Hidden states (n, T, C) of new tokens in the slots from `first` on, at the positions from `start` (n,). Rows
        are padded at their end: what that leaves in the cache is overwritten before it is looked at."""
        width = max(map(len, ids))
        tokens = torch.tensor(
            [[[*row, *[0] * (width - len(row))] for row in rows] for rows in (ids, types)]
        )
        view = self.cache.view(
            first, torch.tensor(start, device=self.device), width, max(start) + width
        )
        input_ids, token_type_ids = tokens.to(self.device)
        return self.model(input_ids, token_type_ids if self.typed else None, cache=view)

    def _score(self, job: QueuedRequest, hidden: Tensor) -> list[Scored]:
        """The prompt's tokens scored by a piece's hidden states (T, C), each of which foretells the token after it."""
        ids = job.request.input_ids[job.done + 1 : job.done + 1 + len(hidden)]
        wanted = torch.tensor(ids, dtype=torch.int64, device=self.device)
        scored = [] if job.done else [Scored(job.request.input_ids[0])]
        for some, these in zip(
            hidden[: len(ids)].split(SCORED_AT_ONCE), wanted.split(SCORED_AT_ONCE), strict=True
        ):
            scored += score(self.model.logits(some), these, job.request.sampling.logprobs or 0)
        return scored

    def _begin(self, jobs: list[QueuedRequest], last: Tensor) -> list[Output]:
        """The jobs, whose prompts are complete and end in `last` (jobs, C), become sequences with their first token."""
        first, source = len(self.running), [*range(len(jobs))]
        self.running += [job.rows[0] for job in jobs]
        for i, job in enumerate(jobs):
            for row in job.rows[1:]:
                self._copy(first + i, len(self.running), job.done)
                self.running.append(row)
                source.append(i)
        outputs = self._draw(first, self.model.logits(last)[source])
        for job, output in zip(jobs, outputs, strict=False):
            output.prompt_logprobs = job.scored if job.request.score_prompt else None
        return outputs

    def _draw(self, first: int, logits: Tensor) -> list[Output]:
        """The next token of the live sequences in the slots from `first` on; those that end leave."""
        rows = self.running[first:]
        outputs = [
            _accept(row, scored)
            for row, scored in zip(rows, draw(logits, rows, self.suppress), strict=True)
        ]
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
        if self._prefilling:
            self._copy(len(self.running) + 1, len(self.running), self._prefilling)

    def _copy(self, source: int, to: int, length: int) -> None:
        self.cache.kv[:, :, to, :, :length] = self.cache.kv[:, :, source, :, :length]


def _accept(row: Sequence, drawn: Scored) -> Output:
    """Append the drawn token to its sequence, unless that has ended."""
    if len(row.ids) >= row.max_length:
        return Output(row.request_id, row.candidate, finish_reason="length")
    if drawn.token < 0 or drawn.token in row.request.stop_ids:
        return Output(row.request_id, row.candidate, finish_reason="stop")
    row.ids.append(drawn.token)
    reason = "length" if len(row.ids) >= row.max_length else None
    return Output(row.request_id, row.candidate, *drawn, finish_reason=reason)


def check(request: Request, slots: int, length: int, vocab_size: int) -> None:
    """Raise ValueError with the reason if the request could never be served."""
    ids, types, sampling = request.input_ids, request.token_type_ids, request.sampling
    longest = length - 1 if sampling.max_new_tokens else length
    outside = [
        i
        for i in (*ids, *(i for word in sampling.bad_words_ids for i in word))
        if not 0 <= i < vocab_size
    ]
    if not 1 <= len(ids) <= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, wanted from 1 to {longest}")
    if outside:
        raise ValueError(f"id {outside[0]} is not in the vocabulary of {vocab_size} entries")
    if types is not None and (len(types) != len(ids) or not set(types) <= {0, 1}):
        raise ValueError(
            f"token_type_ids must be {len(ids)} numbers 0 or 1, one for each of the prompt's tokens"
        )
    if not 1 <= request.n <= slots:
        raise ValueError(f"n is {request.n}, wanted from 1 to {slots}, the number of slots")


class Completion(list[Output]):
    """All outputs of one candidate."""

    @property
    def ids(self) -> list[int]:
        return [output.token for output in self if output.token is not None]


def generate(engine: Engine, requests: Iterable[Request]) -> list[list[Completion]]:
    """Serve the requests, through all slots; of each one its candidates, in order."""
    answers = {
        engine.submit(request): [Completion() for _ in range(request.n)] for request in requests
    }
    while not engine.idle:
        for output in engine.step():
            answers[output.request_id][output.candidate].append(output)
    return list(answers.values())
