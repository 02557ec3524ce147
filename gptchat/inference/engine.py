"""Generation for many requests at once: token ids in, token ids out.

A step does two things. It decodes: every live sequence gets its next token, in one forward pass
over all of them. Then it prefills prompts from the queue, first come first served: several short
ones together, at most `prefill_chunk` tokens with their padding, or the next `prefill_chunk` tokens
of a long one. A prompt that is complete draws its first token. The candidates of a request share
its prefill and start together; a request whose candidates do not all find slots waits, and so do
those behind it.

A slot of the KV cache holds one sequence from position 0 on. Invariants between steps:

- Live sequences occupy the slots 0..len(running)-1, in the order of `running`, so that a pass works
  on a view of the cache. When one leaves, the last one is copied into its slot.
- At most one prompt is partially prefilled. It is first in the queue, stands in the slot after the
  live sequences and moves with their end; slots for all its candidates are reserved.
- Prompts that are prefilled in a group all start at position 0 of their slots; a prompt that
  continues at a later position is alone in its pass.
- Rows of a pass are padded at their end. What padding leaves in the cache is overwritten before
  anything attends to it.
- All ids of a live sequence but the last are in the cache.

So an answer does not depend on the other requests, except for rounding: padding, `slots` and
`prefill_chunk` change the order in which attention sums, and so the last bit of its float32
results. With float32 that moves log-probabilities by 3e-6. bfloat16 and int8 round to 8 bits what
comes next, where a last bit can become a whole step: log-probabilities moved by up to 0.08, and up
to 7 % of answers (8 of 120, of 24 tokens each) took another token somewhere. (int8 with attention
in float64: none.) The same requests at the same steps give the same answers.

Only one thread may use an engine at a time.
"""

from collections import abc, deque
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptchat.inference.linear import prepare_for_inference, without_torch_function
from gptchat.inference.sampling import Row, Sampling, Scored, draw, score
from gptchat.inference.text import CharacterFilter
from gptchat.model.gpt2 import GPT2, NO_TYPE_ROWS, GPT2Config

Ids = abc.Sequence[int]
SCORED_AT_ONCE = 32  # prompt positions whose logits (x V) are in memory together


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it. Tokens that are drawn have the type of the prompt's last one.

    `token_type_ids` is as long as `input_ids`; None adds no types, which is not type 0. Drawing one
    of `stop_ids` ends the answer; it is not emitted. `score_prompt` asks for `prompt_logprobs`.
    """

    input_ids: Ids
    token_type_ids: Ids | None = None
    sampling: Sampling = Sampling()
    n: int = 1  # candidates
    stop_ids: Ids = ()
    score_prompt: bool = False


@dataclass
class Output:
    """What a step gives a candidate: a token, or the reason why there are no more, or both.

    `finish_reason` is "stop" (a stop id, or nothing left to draw), "length", or None: not the last.
    `logprob` and `top` are those of `Scored`. `prompt_logprobs` comes with the first output of a
    request that asked for it: an entry per token, the first one without a log-probability.
    """

    request_id: int
    candidate: int
    token: int | None = None
    logprob: float | None = None
    top: abc.Sequence[tuple[int, float]] = ()
    finish_reason: str | None = None
    prompt_logprobs: list[Scored] | None = None


@dataclass
class Sequence(Row):
    """One candidate of a request. `ids` are its prompt and what has been drawn."""

    request_id: int
    request: Request
    max_length: int  # of ids, prompt and answer together


@dataclass
class QueuedRequest:
    """A request in the queue, and the sequences that it will become, which share a prefill."""

    request: Request
    sequences: list[Sequence]
    n_prefilled: int = 0  # tokens of its prompt in the cache
    prompt_logprobs: list[Scored] = field(default_factory=list)

    @property
    def is_prefilled(self) -> bool:
        return self.n_prefilled == len(self.request.input_ids)

    def next_chunk(self, size: int) -> tuple[Ids, Ids]:
        """Ids and types of the next prompt tokens, at most `size`; () for no types."""
        chunk = slice(self.n_prefilled, self.n_prefilled + size)
        types = self.request.token_type_ids or ()
        return self.request.input_ids[chunk], types[chunk]


class Engine:
    """Generates with a model in `slots` slots of `length` positions.

    `dtype`, one of `linear.DTYPES` or "auto", packs the layers for speed; None takes them as they
    are. The engine has its own copy of the model, which shares parameters but can be packed without
    harm to the original. `suppress` are ids that are never drawn; `characters` is what the setting
    `whole_characters` needs. A step prefills at most `prefill_chunk` prompt tokens, so that long
    prompts do not stall the live sequences.
    """

    def __init__(
        self,
        model: GPT2,
        slots: int = 8,
        length: int | None = None,  # None: the model's n_positions, which is also the maximum
        dtype: str | None = None,
        suppress: Ids = (),
        prefill_chunk: int = 256,
        characters: CharacterFilter | None = None,
    ):
        shared = {id(parameter): parameter for parameter in model.parameters()}
        self.model = deepcopy(model, shared).eval()
        cache_dtype = model.wte.weight.dtype
        if dtype is not None:
            cache_dtype = prepare_for_inference(self.model, dtype)
        self.slots = slots
        self.prefill_chunk = prefill_chunk
        self.length = min(length or model.config.n_positions, model.config.n_positions)
        self.device = self.model.wte.weight.device
        self.suppress = torch.tensor(suppress, dtype=torch.int64, device=self.device)
        self.characters = characters
        self.cache = self.model.kv_cache(slots, self.length, cache_dtype)
        self.waiting: deque[QueuedRequest] = deque()
        self.running: list[Sequence] = []  # in the order of their slots
        self.submitted = 0  # requests so far, and the id of the last one
        self.typed: bool | None = None  # whether requests have token types; None: no request yet

    @property
    def live(self) -> int:
        """Slots in use, or reserved for the candidates of a partially prefilled prompt."""
        reserved = len(self.waiting[0].sequences) if self._n_partial else 0
        return len(self.running) + reserved

    @property
    def queued(self) -> int:
        """Requests that have no slot yet."""
        return len(self.waiting) - (1 if self._n_partial else 0)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def _n_partial(self) -> int:
        """Tokens in the slot of the partially prefilled prompt; 0 where there is none."""
        return self.waiting[0].n_prefilled if self.waiting else 0

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises ValueError if it could never be served."""
        check_request(request, self.slots, self.length, self.model.config)
        typed = request.token_type_ids is not None
        if self.typed not in (None, typed):
            raise ValueError("requests with and without token types cannot share an engine")
        self.typed = typed
        self.submitted += 1
        prompt = request.input_ids
        max_length = min(len(prompt) + request.sampling.max_new_tokens, self.length)
        sequences = [
            Sequence(request.sampling, candidate, list(prompt), self.submitted, request, max_length)
            for candidate in range(request.n)
        ]
        self.waiting.append(QueuedRequest(request, sequences))
        return self.submitted

    def cancel(self, request_id: int, candidate: int | None = None) -> None:
        """Forget one candidate of a request, or all, and free its slots, if it has not ended."""

        def cancelled(sequence: Sequence) -> bool:
            right_candidate = candidate is None or sequence.candidate == candidate
            return sequence.request_id == request_id and right_candidate

        for slot in reversed(range(len(self.running))):
            if cancelled(self.running[slot]):
                self._free(slot)
        for queued in self.waiting:
            queued.sequences = [s for s in queued.sequences if not cancelled(s)]
        self.waiting = deque(queued for queued in self.waiting if queued.sequences)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Decode and prefill once. Returns at most one output for each candidate."""
        with without_torch_function():
            return self._decode() + self._prefill()

    def _decode(self) -> list[Output]:
        """The next token of every live sequence."""
        if not self.running:
            return []
        hidden = self._run(
            ids=[sequence.ids[-1:] for sequence in self.running],
            types=[(sequence.request.token_type_ids or ())[-1:] for sequence in self.running],
            start=[len(sequence.ids) - 1 for sequence in self.running],
            first_slot=0,
        )  # (n, 1, C)
        return self._draw(0, self.model.logits(hidden[:, -1]))

    def _prefill(self) -> list[Output]:
        """The next chunk of prompts, and the first tokens of those that are complete."""
        group = self._admit()
        if not group:
            return []
        chunks = [queued.next_chunk(self.prefill_chunk) for queued in group]
        hidden = self._run(
            ids=[ids for ids, _ in chunks],
            types=[types for _, types in chunks],
            start=[queued.n_prefilled for queued in group],
            first_slot=len(self.running),
        )  # (n, T, C)
        for queued, (ids, _), states in zip(group, chunks, hidden, strict=True):
            if queued.request.score_prompt:
                queued.prompt_logprobs += self._score(queued, states)  # before n_prefilled grows
            queued.n_prefilled += len(ids)
        if not group[0].is_prefilled:  # longer than the chunk, so it is the whole group
            self.waiting.appendleft(group[0])
            return []
        last = [len(ids) - 1 for ids, _ in chunks]
        return self._start(group, hidden[range(len(group)), last])

    def _admit(self) -> list[QueuedRequest]:
        """Take from the queue what is prefilled now: as many as slots and one chunk allow.

        A partially prefilled prompt is longer than a chunk, and so nothing joins it.
        """
        group: list[QueuedRequest] = []
        free = self.slots - len(self.running)
        longest = 0
        while self.waiting:
            queued = self.waiting[0]
            longest = max(longest, len(queued.request.input_ids))
            padded = longest * (len(group) + 1)  # tokens of the group with this prompt
            if len(queued.sequences) > free or (group and padded > self.prefill_chunk):
                break
            free -= len(queued.sequences)
            group.append(self.waiting.popleft())
        return group

    def _run(self, ids: list[Ids], types: list[Ids], start: list[int], first_slot: int) -> Tensor:
        """Hidden states (n, T, C) of n rows of new tokens, padded to the longest.

        They go to n slots from `first_slot` on, to the positions from `start` (n,) on.
        """
        width = max(map(len, ids))
        padded = [[_pad(row, width) for row in ids], [_pad(row, width) for row in types]]
        input_ids, token_type_ids = torch.tensor(padded).to(self.device)  # (n, T) each
        starts = torch.tensor(start, device=self.device)
        view = self.cache.view(first_slot, starts, width, max(start) + width)
        return self.model(input_ids, token_type_ids if self.typed else None, cache=view)

    def _score(self, queued: QueuedRequest, hidden: Tensor) -> list[Scored]:
        """The prompt tokens scored by the hidden states (T, C) of a chunk.

        Each state predicts the token after it; no state predicts the first token of all.
        """
        prompt = queued.request.input_ids
        first = queued.n_prefilled + 1
        next_ids = torch.tensor(
            prompt[first : first + len(hidden)], dtype=torch.int64, device=self.device
        )
        k = queued.request.sampling.logprobs or 0
        scored = [Scored(prompt[0])] if queued.n_prefilled == 0 else []
        id_chunks = next_ids.split(SCORED_AT_ONCE)
        state_chunks = hidden[: len(next_ids)].split(SCORED_AT_ONCE)
        for id_chunk, states in zip(id_chunks, state_chunks, strict=True):
            scored += score(self.model.logits(states), id_chunk, k)
        return scored

    def _start(self, group: list[QueuedRequest], last: Tensor) -> list[Output]:
        """Make prefilled requests live, and draw their first tokens from `last` (group, C).

        The prompts stand in the slots after the live sequences; further candidates get copies.
        """
        first = len(self.running)
        prompt_of = list(range(len(group)))  # index into the group of each new sequence
        self.running += [queued.sequences[0] for queued in group]
        for index, queued in enumerate(group):
            for sequence in queued.sequences[1:]:
                self._copy(first + index, len(self.running), queued.n_prefilled)
                self.running.append(sequence)
                prompt_of.append(index)
        outputs = self._draw(first, self.model.logits(last)[prompt_of])
        # The first outputs are those of each request's first candidate.
        for queued, output in zip(group, outputs, strict=False):
            if queued.request.score_prompt:
                output.prompt_logprobs = queued.prompt_logprobs
        return outputs

    def _draw(self, first_slot: int, logits: Tensor) -> list[Output]:
        """Draw a token for the live sequences from `first_slot` on; those that end leave."""
        sequences = self.running[first_slot:]
        drawn = draw(logits, sequences, self.suppress, self.characters)
        outputs = [_accept(*pair) for pair in zip(sequences, drawn, strict=True)]
        for index in reversed(range(len(outputs))):
            if outputs[index].finish_reason:
                self._free(first_slot + index)
        return outputs

    def _free(self, slot: int) -> None:
        """Take a sequence out of its slot.

        The last live sequence takes the slot, and the partial prompt the one that becomes free.
        """
        last = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = last
            self._copy(len(self.running), slot, len(last.ids))
        if self._n_partial:
            self._copy(len(self.running) + 1, len(self.running), self._n_partial)

    def _copy(self, source: int, target: int, length: int) -> None:
        self.cache.kv[:, :, target, :, :length] = self.cache.kv[:, :, source, :, :length]


def _pad(ids: Ids, width: int) -> list[int]:
    return [*ids, *[0] * (width - len(ids))]


def _accept(sequence: Sequence, drawn: Scored) -> Output:
    """Append the drawn token to its sequence, unless that has ended."""
    output = Output(sequence.request_id, sequence.candidate)
    if len(sequence.ids) >= sequence.max_length:  # max_new_tokens is 0
        output.finish_reason = "length"
    elif drawn.token < 0 or drawn.token in sequence.request.stop_ids:
        output.finish_reason = "stop"
    else:
        sequence.ids.append(drawn.token)
        output.token, output.logprob, output.top = drawn
        if len(sequence.ids) >= sequence.max_length:
            output.finish_reason = "length"
    return output


def check_request(request: Request, slots: int, length: int, config: GPT2Config) -> None:
    """Raise ValueError with the reason if the request could never be served."""
    ids = request.input_ids
    types = request.token_type_ids
    longest = length - 1 if request.sampling.max_new_tokens else length
    if not 1 <= len(ids) <= longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, wanted from 1 to {longest}")
    for id in ids:
        if type(id) is not int:  # a float would end the pass of all requests
            raise ValueError(f"id {id!r} is no int")
        if not 0 <= id < config.vocab_size:
            raise ValueError(f"id {id} is not in the vocabulary of {config.vocab_size} entries")
    if types is not None and config.type_rows == NO_TYPE_ROWS:
        raise ValueError("the model has no rows for token types, wanted token_type_ids None")
    if types is not None and (len(types) != len(ids) or not set(types) <= {0, 1}):
        raise ValueError(
            f"token_type_ids must be {len(ids)} numbers 0 or 1, one for each of the prompt's tokens"
        )
    if type(request.n) is not int or not 1 <= request.n <= slots:
        raise ValueError(f"n is {request.n}, wanted from 1 to {slots}, the number of slots")


class Completion(list[Output]):
    """All outputs of one candidate."""

    @property
    def ids(self) -> list[int]:
        return [output.token for output in self if output.token is not None]


def generate(engine: Engine, requests: Iterable[Request]) -> list[list[Completion]]:
    """Serve the requests together. Returns each one's candidates, in order."""
    completions: dict[int, list[Completion]] = {}
    for request in requests:
        completions[engine.submit(request)] = [Completion() for _ in range(request.n)]
    while not engine.idle:
        for output in engine.step():
            completions[output.request_id][output.candidate].append(output)
    return list(completions.values())
