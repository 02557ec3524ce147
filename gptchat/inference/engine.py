"""Generation for many requests at once: token ids in, token ids out.

A step decodes, then prefills. Decoding draws the next token of every live sequence in one pass.
Prefill takes prompts from the queue in order: several short ones together, or the next
`prefill_chunk` tokens of a long one. The candidates of a request share its prefill, and start
together when there are slots for all of them.

Invariants between steps:

- Live sequences are in the slots 0..len(running)-1 of the KV cache, in the order of `running`. When
  one leaves, the last one takes its slot.
- At most one prompt is partially prefilled: the first in the queue, in the slot after the live
  sequences. Slots for all its candidates are reserved.
- All ids of a live sequence but the last are in the cache.

Row i of a pass works on slot `first_slot` + i, from its own start position. Its padding goes to
positions that are overwritten before anything attends to them, so max(start) + width <= length.

An answer depends on other requests only by rounding: a batch changes the order in which attention
sums. In float32 that moves log-probabilities by 3e-6. bfloat16 and int8 round to 8 bits next, so
there it is up to 0.08, and 8 of 120 answers took another token somewhere. Replaying the same
requests at the same steps on a fresh engine reproduces the answers.

Only one thread may use an engine at a time.
"""

from array import array
from collections import deque
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor

from gptchat.inference.draw import Draw, Scored, score
from gptchat.inference.linear import prepare_for_inference, without_torch_function
from gptchat.inference.prefix_cache import Prefix, PrefixCache
from gptchat.inference.request import (
    Candidate,
    Ids,
    Output,
    QueuedRequest,
    Request,
    check_request,
)
from gptchat.inference.text import CharacterFilter
from gptchat.model.gpt2 import GPT2

SCORED_AT_ONCE = 32  # prompt positions whose logits (x V) are in memory together


class Batch:
    """What a decoding step reads of the running candidates, until one joins or leaves.

    `input_ids` and `types` (n, 1) hold each one's last token, `starts` (n,) its position.
    """

    def __init__(self, running: list[Candidate], draw: Draw):
        self.draw = draw
        last = [[one.ids[-1], one.request.types[-1] if one.request.types else 0] for one in running]
        self.input_ids, self.types = torch.tensor(last, device=draw.device).split(1, dim=1)
        starts = [len(one.ids) - 1 for one in running]
        self.starts = torch.tensor(starts, device=draw.device)


class Engine:
    """Generates with a model in `slots` slots of `length` positions.

    `dtype`, one of `linear.DTYPES` or "auto", packs the layers of a copy of the model; None takes
    them as they are. `suppress` are ids that are never drawn; the setting `whole_characters` needs
    `characters`. Chunks keep long prompts from stalling live sequences. With `prefix_cache`,
    rounding also depends on earlier requests.
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
        prefix_cache: bool = False,
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
        self.prefix_cache = PrefixCache(self.cache, slots, prefix_cache)
        self.waiting: deque[QueuedRequest] = deque()
        self.running: list[Candidate] = []  # in the order of their slots
        self.batch: Batch | None = None  # of these; None after one joined or left
        self.submitted = 0  # requests so far, which is also the id of the last one
        self.typed: bool | None = None  # whether requests have token types; None before the first

    @property
    def live(self) -> int:
        """Slots in use, or reserved for the candidates of a partially prefilled prompt."""
        reserved = len(self.waiting[0].candidates) if self._n_partial else 0
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
        """Tokens of the partially prefilled prompt in its slot; 0 if there is none."""
        return self.waiting[0].n_prefilled if self.waiting else 0

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises ValueError if it can never be served."""
        check_request(request, self.slots, self.length, self.model.config)
        typed = request.token_type_ids is not None
        if self.typed not in (None, typed):
            raise ValueError("requests with and without token types cannot share an engine")
        self.typed = typed
        self.submitted += 1
        prompt = request.input_ids
        max_length = min(len(prompt) + request.sampling.max_new_tokens, self.length)
        candidates = [
            Candidate(
                sampling=request.sampling,
                candidate=number,
                ids=array("q", prompt),
                n_prompt=len(prompt),
                stop_ids=request.stop_ids,
                request_id=self.submitted,
                request=request,
                max_length=max_length,
            )
            for number in range(request.n)
        ]
        self.waiting.append(QueuedRequest(request, candidates))
        return self.submitted

    def cancel(self, request_id: int, candidate: int | None = None) -> None:
        """Forget one candidate of a request, or all, and free the slots of those not ended."""

        def cancelled(one: Candidate) -> bool:
            return one.request_id == request_id and candidate in (None, one.candidate)

        for slot in reversed(range(len(self.running))):
            if cancelled(self.running[slot]):
                self._free(slot)
        for queued in self.waiting:
            queued.candidates = [one for one in queued.candidates if not cancelled(one)]
        if self._n_partial and not self.waiting[0].candidates:
            request, done = self.waiting[0].request, slice(self._n_partial)
            ids, types = request.input_ids[done], request.types[done]
            self.prefix_cache.remember(len(self.running), ids, types)
        self.waiting = deque(queued for queued in self.waiting if queued.candidates)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Decode and prefill once. Returns at most one output per candidate."""
        with without_torch_function():
            return self._decode() + self._prefill()

    def _decode(self) -> list[Output]:
        """The next token of every live sequence."""
        if not self.running:
            return []
        batch = self.batch or Batch(self.running, self._drawer(self.running))
        self.batch = batch  # `_draw` resets it if a sequence ends
        length = max(len(candidate.ids) for candidate in self.running)
        hidden = self._run(batch.input_ids, batch.types, batch.starts, length, first_slot=0)
        outputs, batch.input_ids = self._draw(batch.draw, 0, self.model.logits(hidden[:, -1]))
        batch.starts += 1
        return outputs

    def _drawer(self, candidates: list[Candidate]) -> Draw:
        return Draw(candidates, self.suppress, self.characters)

    def _prefill(self) -> list[Output]:
        """The next chunk of prompts, and the first tokens of those that are complete."""
        group = self._admit()
        if not group:
            return []
        chunks = [queued.next_chunk(self.prefill_chunk) for queued in group]
        start = [queued.n_prefilled for queued in group]
        width = max(len(ids) for ids, _ in chunks)
        padded = [[_pad(row, width) for row in rows] for rows in zip(*chunks, strict=True)]
        input_ids, types = torch.tensor(padded, device=self.device)  # (n, T) each
        starts = torch.tensor(start, device=self.device)
        hidden = self._run(input_ids, types, starts, max(start) + width, len(self.running))
        for queued, (ids, _), states in zip(group, chunks, hidden, strict=True):
            if queued.request.score_prompt:
                queued.prompt_logprobs += self._score(queued, states)  # before n_prefilled grows
            queued.n_prefilled += len(ids)
        if not group[0].is_prefilled:  # longer than the chunk, so alone in its group
            self.waiting.appendleft(group[0])
            return []
        last = [len(ids) - 1 for ids, _ in chunks]
        return self._start(group, hidden[range(len(group)), last])

    def _admit(self) -> list[QueuedRequest]:
        """Take requests from the queue, as many as slots and one chunk allow, into their slots."""
        if self._n_partial:
            return [self.waiting.popleft()]
        group: list[QueuedRequest] = []
        free = self.slots - len(self.running)
        start = width = 0  # of a pass over the group: the farthest start, the longest row
        while self.waiting and len(self.waiting[0].candidates) <= free:
            queued = self.waiting[0]
            request = queued.request
            slot = len(self.running) + len(group)
            prefix = Prefix(slot, 0)
            if not request.score_prompt:  # which wants the hidden state of every position
                prefix = self.prefix_cache.find(slot, request.input_ids, request.types)
            start = max(start, prefix.length)
            width = max(width, len(request.input_ids) - prefix.length)
            padded = width * (len(group) + 1)  # tokens of the pass with this prompt
            if group and (padded > self.prefill_chunk or start + width > self.length):
                break
            self.prefix_cache.take(slot, prefix)
            queued.n_prefilled = queued.n_cached = prefix.length
            free -= len(queued.candidates)
            group.append(self.waiting.popleft())
        return group

    def _run(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        starts: Tensor,
        length: int,
        first_slot: int,
    ) -> Tensor:
        """Hidden states (n, T, C) of new tokens in the n slots from `first_slot` on.

        They begin at `starts` (n,); `length` is where the last row ends.
        """
        assert length <= self.length
        view = self.cache.view(first_slot, starts, input_ids.shape[1], length)
        return self.model.hidden(input_ids, token_type_ids if self.typed else None, cache=view)

    def _score(self, queued: QueuedRequest, hidden: Tensor) -> list[Scored]:
        """The prompt tokens scored by the hidden states (T, C) of a chunk.

        Each state predicts the token after it; none predicts the prompt's first token.
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

        The first candidate of each takes the prompt's slot; the others get copies of it.
        """
        first = len(self.running)
        prompt_of = list(range(len(group)))  # index into the group of each new sequence
        self.running += [queued.candidates[0] for queued in group]
        for index, queued in enumerate(group):
            for candidate in queued.candidates[1:]:
                slot = len(self.running)
                spare = self.prefix_cache.least_recently_used(slot)
                self.prefix_cache.move(first + index, slot, queued.n_prefilled, spare)
                self.running.append(candidate)
                prompt_of.append(index)
        self.batch = None
        draw = self._drawer(self.running[first:])
        outputs, _ = self._draw(draw, first, self.model.logits(last)[prompt_of])
        # The first outputs are those of each request's first candidate.
        for queued, output in zip(group, outputs, strict=False):
            output.n_cached = queued.n_cached
            if queued.request.score_prompt:
                output.prompt_logprobs = queued.prompt_logprobs
        return outputs

    def _draw(self, draw: Draw, first_slot: int, logits: Tensor) -> tuple[list[Output], Tensor]:
        """The outputs of the live sequences from `first_slot` on, and the drawn ids (n, 1)."""
        candidates = self.running[first_slot:]
        drawn, ids = draw(logits)
        outputs = [one.take(scored) for one, scored in zip(candidates, drawn, strict=True)]
        for index in reversed(range(len(outputs))):
            if outputs[index].finish_reason:
                self._free(first_slot + index, is_broken=drawn[index].token < 0)
        return outputs, ids

    def _free(self, slot: int, is_broken: bool = False) -> None:
        """Take a sequence out of its slot.

        The last live sequence takes the slot, and a partial prompt the one that this frees. A
        sequence `is_broken` if nothing was left to draw; the NaN that it may have left is zeroed.
        """
        self.batch = None
        cache = self.prefix_cache
        if is_broken:
            self.cache.clear(slot)
        else:
            cache.remember(slot, *self.running[slot].cached)
        last = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = last
            cache.move(len(self.running), slot, len(last.ids) - 1, spare=len(self.running))
        if self._n_partial:
            free, partial = len(self.running), len(self.running) + 1
            cache.move(partial, free, self._n_partial, spare=partial)


def _pad(ids: Ids, width: int) -> list[int]:
    return [*ids, *[0] * (width - len(ids))]


class Completion(list[Output]):
    """All outputs of one candidate."""

    @property
    def ids(self) -> list[int]:
        return [output.token for output in self if output.token is not None]


def generate(engine: Engine, requests: Iterable[Request]) -> list[list[Completion]]:
    """The candidates of each request, served together."""
    completions: dict[int, list[Completion]] = {}
    for request in requests:
        completions[engine.submit(request)] = [Completion() for _ in range(request.n)]
    while not engine.idle:
        for output in engine.step():
            completions[output.request_id][output.candidate].append(output)
    return list(completions.values())
