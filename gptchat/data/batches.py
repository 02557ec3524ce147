"""Micro-batch number -> batch: a pure function of (seed, number), so there is no state to save and none to skip.

Training sees an endless sequence of rows, epoch after epoch; micro-batch number g is rows g * batch_size and on. Ranks
and accumulation only decide who takes which number. Orders are keyed permutations: flat memory, however large the data.

lm: rows are windows of `n_ctx` tokens across documents. An epoch cuts the stream, closed to a circle, at an offset of
its own; its last window repeats up to n_ctx - 1 tokens of its first, none is left out.

chatlm: one permutation deals the dialogues into pools of POOL, for good; within a pool, whole dialogues are packed into
rows by best fit, which fills 99 % of the positions. Each epoch permutes the pools, the dialogues of a pool (those of
equal length change places) and its rows. Not packed, each dialogue is a row, padded to the longest of its micro-batch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from gptchat.data.dialogue import IGNORE, encode_example, fit
from gptchat.data.encoding import in_order
from gptchat.data.shards import Shards
from gptchat.data.tokenizer import Tokenizer

POOL = 1024  # dialogues packed together
ROUNDED = 256  # to a multiple of this, targets are given to the model


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, (B, T), int64: `targets` holds the id that follows each position, or -100; `segments` (int32)
    numbers the dialogues in a row, -1 where there is none. `n_tokens` counts the positions that hold a token."""

    input_ids: Tensor
    targets: Tensor
    n_targets: int
    n_tokens: int
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    segments: Tensor | None = None

    def inputs(self, device: torch.device | str) -> dict[str, Tensor | None]:
        """The model's arguments: also `target_positions` (N,), the flat positions that have a target (None: all have), and those
        targets (N,). N is rounded up by ignored ones: an allocator that meets new sizes each time hoards memory."""
        flat, target_positions = self.targets.flatten(), None
        if self.n_targets < len(flat):
            target_positions = torch.cat(
                [
                    (flat != IGNORE).nonzero()[:, 0],
                    (flat == IGNORE).nonzero()[: -self.n_targets % ROUNDED, 0],
                ]
            )
        tensors = {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "segments": self.segments,
            "position_ids": self.position_ids,
            "target_positions": target_positions,
            "targets": flat if target_positions is None else flat[target_positions],
        }
        return {
            key: tensor if tensor is None else tensor.to(device, non_blocking=True)
            for key, tensor in tensors.items()
        }


def draw_key(*parts: object) -> int:
    """A 64-bit number drawn by its arguments."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(values: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a permutation of range(n), drawn by `key`, takes each of `values`, without storing it: a Feistel network on
    an even number of bits, applied again to what falls outside (cycle walking; Black and Rogaway 2002)."""
    half = np.uint64(max(1, (n - 1).bit_length() + 1 >> 1))
    mask, rounds = np.uint64((1 << int(half)) - 1), [np.uint64(draw_key(key, i)) for i in range(6)]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in rounds:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        return left << half | right

    moved = network(values.astype(np.uint64))
    while (outside := moved >= n).any():
        moved[outside] = network(moved[outside])
    return moved.astype(np.int64)


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `room`: best fit, longest first. How many rows there are depends on the
    lengths only, not on their order. Rows by free space are found in an integer with a bit for each space."""
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(room + 1)]
    spaces = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        fitting = spaces >> lengths[i]
        if fitting:
            space = (fitting & -fitting).bit_length() - 1 + lengths[i]
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(i)
        space -= lengths[i]
        with_space[space].append(row)
        spaces |= 1 << space
    return rows


class Batches:
    """The micro-batches of a split: rows of `n_ctx` positions, `batch_size` rows each."""

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        n_ctx: int,
        batch_size: int,
        seed: int = 0,
        targets: str = "response",
        packed: bool = True,
    ):
        self.shards, self.tokenizer, self.n_ctx, self.batch_size = (
            shards,
            tokenizer,
            n_ctx,
            batch_size,
        )
        self.seed, self.targets, self.packed = seed, targets, packed
        self._pool_order = lru_cache(2)(self._order_pools)
        self._pool_rows = lru_cache(2)(self._pack_pool)

    def steps_per_epoch(self, per_step: int) -> int:
        """Steps of `per_step` micro-batches until every row was seen once; the last one may begin the next epoch."""
        return -(-self.rows_per_epoch // (self.batch_size * per_step))

    def micro_batch(self, number: int) -> Batch:
        """The micro-batch of that number in the endless sequence."""
        rows = range(number * self.batch_size, (number + 1) * self.batch_size)
        if self.shards.task == "lm":
            return self._windows(
                [self._window_start(*divmod(row, self.rows_per_epoch)) for row in rows]
            )
        return self._dialogues([self._row(*divmod(row, self.rows_per_epoch)) for row in rows])

    def evaluation(self) -> Iterator[Batch]:
        """Everything once, in order. The first token of a stream is predicted from [EOS]."""
        if self.shards.task == "lm":
            starts = range(0, self.shards.n_tokens, self.n_ctx)
            for i in range(0, len(starts), self.batch_size):
                yield self._windows(starts[i : i + self.batch_size], stop=self.shards.n_tokens)
            return
        for first in range(0, self.shards.documents, POOL):
            rows = self._rows(np.arange(first, min(first + POOL, self.shards.documents)))
            for i in range(0, len(rows), self.batch_size):
                yield self._dialogues(rows[i : i + self.batch_size])

    def empty(self) -> Batch:
        """A micro-batch without a target, for a process that has none left in a step."""
        return Batch(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORE), 0, 0)

    @cached_property
    def n_bytes(self) -> int:
        """UTF-8 bytes of what `evaluation` predicts: of the text for lm, of the target tokens for chatlm."""
        if self.shards.task == "lm":
            return self.shards.n_bytes
        lengths = torch.tensor([len(data) for data in self.tokenizer.token_bytes])
        return sum(
            int(lengths[batch.targets[batch.targets != IGNORE]].sum())
            for batch in self.evaluation()
        )

    @cached_property
    def rows_per_epoch(self) -> int:
        return (
            -(-self.shards.n_tokens // self.n_ctx)
            if self.shards.task == "lm"
            else int(self._rows_per_pool.sum())
        )

    # lm

    def _window_start(self, epoch: int, row: int) -> int:
        window = permute(np.array([row]), self.rows_per_epoch, draw_key(self.seed, epoch))[0]
        return int(window) * self.n_ctx + draw_key(self.seed, epoch, "offset") % self.n_ctx

    def _windows(self, starts: Sequence[int], stop: int | None = None) -> Batch:
        """Windows whose first targets stand at `starts`; none from `stop` on, where it is given."""
        ids = torch.from_numpy(
            np.stack([self._circle(start - 1, self.n_ctx + 1) for start in starts])
        )
        targets = ids[:, 1:].clone()
        if stop is not None:
            targets[torch.tensor(starts)[:, None] + torch.arange(self.n_ctx) >= stop] = IGNORE
        n = int((targets != IGNORE).sum())
        return Batch(ids[:, :-1].contiguous(), targets, n, n)

    def _circle(self, start: int, n: int) -> np.ndarray:
        """n ids of the stream, whose end, an [EOS], is followed by its beginning."""
        parts, total = [], self.shards.n_tokens
        while n > 0:
            start %= total
            parts.append(self.shards.tokens(start, min(start + n, total)))
            start, n = start + len(parts[-1]), n - len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    # chatlm

    @cached_property
    def _rows_per_pool(self) -> np.ndarray:
        return np.array(
            [len(self._rows(self._pool(i))) for i in range(-(-self.shards.documents // POOL))]
        )

    def _pool(self, number: int) -> np.ndarray:
        """The dialogues of a pool."""
        n = self.shards.documents
        return permute(
            np.arange(number * POOL, min((number + 1) * POOL, n)), n, draw_key(self.seed, "pools")
        )

    def _rows(self, dialogues: np.ndarray) -> list[list[int]]:
        """These dialogues in rows."""
        if not self.packed:
            return dialogues[:, None].tolist()
        return [
            dialogues[row].tolist() for row in pack(self._lengths(dialogues).tolist(), self.n_ctx)
        ]

    def _lengths(self, dialogues: np.ndarray) -> np.ndarray:
        """Input tokens of each dialogue: its turns' and the [SEP]s between; where that is too much, what `fit` says."""
        starts, turns = self.shards.starts, self.shards.turns
        first, last = starts[dialogues], starts[dialogues + 1]
        lengths = turns[last] - turns[first] + last - first - 1
        for i in (lengths > self.n_ctx).nonzero()[0]:
            lengths[i] = fit(np.diff(turns[first[i] : last[i] + 1]).tolist(), self.n_ctx)[2]
        return lengths

    def _order_pools(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pools in the epoch's order, and how many rows there are up to each one's end."""
        n = len(self._rows_per_pool)
        order = permute(np.arange(n), n, draw_key(self.seed, epoch))
        return order, np.cumsum(self._rows_per_pool[order])

    def _pack_pool(self, epoch: int, number: int) -> list[list[int]]:
        """A pool's rows in the epoch's order."""
        key, pool = draw_key(self.seed, epoch, number), self._pool(number)
        rows = self._rows(pool[permute(np.arange(len(pool)), len(pool), key)])
        return [rows[i] for i in permute(np.arange(len(rows)), len(rows), key)]

    def _row(self, epoch: int, row: int) -> list[int]:
        order, ends = self._pool_order(epoch)
        at = int(np.searchsorted(ends, row, side="right"))
        return self._pool_rows(epoch, int(order[at]))[
            row - int(ends[at])
        ]  # counted from the pool's end

    def _dialogues(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Rows of dialogues, one behind the other."""
        cls_id, sep_id = self.tokenizer.cls_id, self.tokenizer.sep_id
        examples = [
            [
                encode_example(self.shards.dialogue(i), cls_id, sep_id, self.n_ctx, self.targets)
                for i in row
            ]
            for row in rows
        ]
        length = (
            self.n_ctx
            if self.packed
            else max(len(example.targets) for row in examples for example in row)
        )
        ids, types, positions, segments, targets = (
            np.zeros((len(rows), length), np.int64) for _ in range(5)
        )
        segments -= 1
        targets += IGNORE
        for row, packed in enumerate(examples):
            start = 0
            for number, example in enumerate(packed):
                span = slice(start, start := start + len(example.targets))
                ids[row, span], types[row, span] = example.input_ids, example.token_type_ids
                targets[row, span], segments[row, span] = example.targets, number
                positions[row, span] = np.arange(len(example.targets))
        arrays = [
            torch.from_numpy(array)
            for array in (ids, targets, types, positions, segments.astype(np.int32))
        ]
        n_targets, n_tokens = int((targets != IGNORE).sum()), int((segments >= 0).sum())
        return Batch(
            arrays[0], arrays[1], n_targets, n_tokens, *(arrays[2:] if self.packed else arrays[2:3])
        )


@contextmanager
def prefetch(
    batches: Batches, first: int, last: int, per_step: int, indices: Sequence[int]
) -> Iterator[Iterator[list[Batch]]]:
    """Yields an iterator over the steps first..last-1: this process's micro-batches, by their `indices` in the step; a
    thread makes those of the next step meanwhile. An index of `per_step` or more is an empty micro-batch."""

    def step(number: int) -> list[Batch]:
        return [
            batches.micro_batch(number * per_step + i) if i < per_step else batches.empty()
            for i in indices
        ]

    with ThreadPoolExecutor(1) as executor:
        yield in_order(executor, step, range(first, last), ahead=2)
