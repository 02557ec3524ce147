"""Micro-batch number to batch, without state: a pure function of (seed, number).

Training sees an endless sequence of rows, epoch after epoch. Micro-batch g holds the `batch_size`
rows from g * batch_size on, across the end of an epoch if need be. Micro-batch i of a step is
number step * per_step + i; processes only divide these numbers among themselves. So there is no
loader or generator state to save: a resumed run, or one with another number of processes, goes on
with the same batches.

lm: a row is a window of `n_ctx` tokens, which may span documents. Each epoch treats the stream as a
circle, cuts it into windows from an offset of its own, and shuffles them. No token is left out; the
last window repeats up to n_ctx - 1 tokens of the first.

chatlm: dialogues are dealt at random into pools of POOL dialogues, the same in all epochs. The
dialogues of a pool are packed whole into rows of `n_ctx` tokens, longest first, by best fit (99 %
full with the default corpora). Each epoch shuffles the pools and the rows of a pool; from epoch to
epoch the packing differs only in which of several equally long dialogues takes a place. With
`packed = false` each dialogue is a row, padded to the longest of its micro-batch.

Invariants:
- The same seed and number give the same micro-batch, in any process, in any order of calls.
- An epoch holds every dialogue once, and every token of lm at least once.
- A packed dialogue is never split, its positions start at 0, and its segment number keeps
  attention inside it. Only a dialogue longer than `n_ctx` is truncated, by dialogue.py.
- Permutations are computed from a key. All that is kept and grows with the data is three integers
  for each pool.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptchat.data.dialogue import IGNORE, Example, encode_example, fit
from gptchat.data.encoding import in_order
from gptchat.data.keyed_draw import draw_key, permute
from gptchat.data.shards import Shards
from gptchat.data.tokenizer import Tokenizer

POOL = 1024  # dialogues packed together
TARGETS_MULTIPLE = 256  # the number of targets given to the model is a multiple of this


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, all tensors (B, T).

    `targets` holds the id that follows each position, or -100 (IGNORE). `segments` numbers the
    dialogues in a row from 0, with -1 for padding. `position_ids` and `segments` are None if a row
    is a single sequence; `token_type_ids` is None for lm.
    """

    input_ids: Tensor  # int64
    targets: Tensor  # int64
    n_targets: int  # positions that have a target
    n_tokens: int  # positions that hold a token
    token_type_ids: Tensor | None = None  # int64
    position_ids: Tensor | None = None  # int64
    segments: Tensor | None = None  # int32

    def inputs(self, device: torch.device | str) -> dict[str, Tensor | None]:
        """The model's arguments, on `device`.

        `target_positions` (N,) are the flat positions that have a target, None if all have one;
        `targets` (N,) are those targets. N is rounded up to a multiple of TARGETS_MULTIPLE with
        positions whose target is -100: an allocator that meets ever new sizes hoards memory.
        """
        targets = self.targets.flatten()  # (B * T,)
        target_positions = None
        if self.n_targets < len(targets):
            with_target = (targets != IGNORE).nonzero()[:, 0]
            without_target = (targets == IGNORE).nonzero()[:, 0]
            padding = without_target[: -self.n_targets % TARGETS_MULTIPLE]
            target_positions = torch.cat([with_target, padding])  # (N,)
            targets = targets[target_positions]  # (N,)
        arguments = {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "segments": self.segments,
            "position_ids": self.position_ids,
            "target_positions": target_positions,
            "targets": targets,
        }
        for name, tensor in arguments.items():
            if tensor is not None:
                arguments[name] = tensor.to(device, non_blocking=True)
        return arguments


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity`: best fit, longest first.

    No length may exceed `capacity`. The number of rows depends on the lengths only, not on their
    order.
    """
    rows: list[list[int]] = []
    # Number of free positions -> indices into `rows`.
    rows_with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set if some row has s free positions
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for i in longest_first:
        length = lengths[i]
        leftovers = spaces >> length  # bit s is set if some row would keep s free positions
        if leftovers:
            tightest = (leftovers & -leftovers).bit_length() - 1  # the lowest bit that is set
            space = length + tightest
            index = rows_with_space[space].pop()
            if not rows_with_space[space]:
                spaces ^= 1 << space
        else:
            space = capacity
            index = len(rows)
            rows.append([])
        rows[index].append(i)
        rows_with_space[space - length].append(index)
        spaces |= 1 << (space - length)
    return rows


class EpochOrder(NamedTuple):
    """The pools of dialogues in the order of one epoch."""

    epoch: int
    pools: np.ndarray  # the numbers of the pools
    first_rows: np.ndarray  # the number of the first row of each, counted in the epoch


class PackedPool(NamedTuple):
    """The rows of one pool in the order of one epoch."""

    epoch: int
    pool: int
    rows: list[list[int]]  # numbers of dialogues


class Batches:
    """The micro-batches of a split: `batch_size` rows of `n_ctx` positions each."""

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
        self.shards = shards
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.batch_size = batch_size
        self.seed = seed
        self.targets = targets
        self.packed = packed
        # Rows are asked for in ascending order, so the last epoch and the last pool are kept.
        self._last_order: EpochOrder | None = None
        self._last_pool: PackedPool | None = None

    @cached_property
    def rows_per_epoch(self) -> int:
        """Rows until every token or dialogue was seen."""
        if self.shards.task == "lm":
            return _ceil_div(self.shards.n_tokens, self.n_ctx)
        return int(self._rows_per_pool.sum())

    def steps_per_epoch(self, per_step: int) -> int:
        """Steps of `per_step` micro-batches until every row was seen.

        The last step may begin the next epoch.
        """
        return _ceil_div(self.rows_per_epoch, self.batch_size * per_step)

    def micro_batch(self, number: int) -> Batch:
        """The micro-batch of that number in the endless sequence."""
        rows = range(number * self.batch_size, (number + 1) * self.batch_size)
        places = [divmod(row, self.rows_per_epoch) for row in rows]  # (epoch, row of the epoch)
        if self.shards.task == "lm":
            return self._window_batch([self._window_start(epoch, row) for epoch, row in places])
        return self._dialogue_batch([self._dialogues_of_row(epoch, row) for epoch, row in places])

    def evaluation(self) -> Iterator[Batch]:
        """Everything once, in order. The first token of a stream is predicted from [EOS]."""
        size = self.batch_size
        if self.shards.task == "lm":
            starts = range(0, self.shards.n_tokens, self.n_ctx)
            for i in range(0, len(starts), size):
                yield self._window_batch(starts[i : i + size], stop=self.shards.n_tokens)
        else:
            for first in range(0, self.shards.documents, POOL):
                last = min(first + POOL, self.shards.documents)
                rows = self._pack(np.arange(first, last))
                for i in range(0, len(rows), size):
                    yield self._dialogue_batch(rows[i : i + size])

    def empty(self) -> Batch:
        """A micro-batch without a target, for a process that has none left in a step."""
        return Batch(
            input_ids=torch.zeros(1, 1, dtype=torch.int64),
            targets=torch.full((1, 1), IGNORE),
            n_targets=0,
            n_tokens=0,
        )

    @cached_property
    def n_bytes(self) -> int:
        """UTF-8 bytes that `evaluation` predicts: the text's (lm), the target tokens' (chatlm)."""
        if self.shards.task == "lm":
            return self.shards.n_bytes
        lengths = torch.tensor([len(data) for data in self.tokenizer.token_bytes])
        total = 0
        for batch in self.evaluation():
            targets = batch.targets[batch.targets != IGNORE]
            total += int(lengths[targets].sum())
        return total

    # lm

    def _window_start(self, epoch: int, row: int) -> int:
        """The position in the stream of the first target of an epoch's row."""
        key = draw_key(self.seed, epoch)
        window = int(permute(np.array([row]), self.rows_per_epoch, key)[0])
        offset = draw_key(self.seed, epoch, "offset") % self.n_ctx
        return window * self.n_ctx + offset

    def _window_batch(self, starts: Sequence[int], stop: int | None = None) -> Batch:
        """Windows whose first targets stand at `starts`; from `stop` on there is no target."""
        windows = [self._circle(start - 1, self.n_ctx + 1) for start in starts]
        ids = torch.from_numpy(np.stack(windows))  # (B, T + 1)
        targets = ids[:, 1:].clone()
        if stop is not None:
            positions = torch.tensor(starts)[:, None] + torch.arange(self.n_ctx)  # (B, T)
            targets[positions >= stop] = IGNORE
        n_targets = int((targets != IGNORE).sum())
        return Batch(ids[:, :-1].contiguous(), targets, n_targets, n_tokens=n_targets)

    def _circle(self, start: int, length: int) -> np.ndarray:
        """`length` ids of the stream, whose end, an [EOS], is followed by its beginning."""
        total = self.shards.n_tokens
        parts = []
        while length > 0:
            start %= total
            part = self.shards.tokens(start, min(start + length, total))
            parts.append(part)
            start += len(part)
            length -= len(part)
        return np.concatenate(parts).astype(np.int64)

    # chatlm

    def _dialogues_of_row(self, epoch: int, row: int) -> list[int]:
        """The dialogues of an epoch's row."""
        order = self._order(epoch)
        place = int(np.searchsorted(order.first_rows, row, side="right")) - 1
        rows = self._pool_rows(epoch, int(order.pools[place]))
        return rows[row - int(order.first_rows[place])]

    def _order(self, epoch: int) -> EpochOrder:
        order = self._last_order
        if order is None or order.epoch != epoch:
            n_pools = len(self._rows_per_pool)
            pools = permute(np.arange(n_pools), n_pools, draw_key(self.seed, epoch))
            n_rows = self._rows_per_pool[pools]
            order = EpochOrder(epoch, pools, np.cumsum(n_rows) - n_rows)
            self._last_order = order
        return order

    def _pool_rows(self, epoch: int, pool: int) -> list[list[int]]:
        """A pool's rows in the epoch's order."""
        last = self._last_pool
        if last is None or (last.epoch, last.pool) != (epoch, pool):
            key = draw_key(self.seed, epoch, pool)
            dialogues = self._dialogues_of_pool(pool)
            dialogues = dialogues[permute(np.arange(len(dialogues)), len(dialogues), key)]
            rows = self._pack(dialogues)
            rows = [rows[i] for i in permute(np.arange(len(rows)), len(rows), key)]
            last = PackedPool(epoch, pool, rows)
            self._last_pool = last
        return last.rows

    @cached_property
    def _rows_per_pool(self) -> np.ndarray:
        n_pools = _ceil_div(self.shards.documents, POOL)
        return np.array([len(self._pack(self._dialogues_of_pool(pool))) for pool in range(n_pools)])

    def _dialogues_of_pool(self, number: int) -> np.ndarray:
        """The dialogues of a pool."""
        n = self.shards.documents
        places = np.arange(number * POOL, min((number + 1) * POOL, n))
        return permute(places, n, draw_key(self.seed, "pools"))

    def _pack(self, dialogues: np.ndarray) -> list[list[int]]:
        """Rows of these dialogues."""
        if not self.packed:
            return dialogues[:, None].tolist()
        rows = pack(self._lengths(dialogues).tolist(), self.n_ctx)
        return [dialogues[row].tolist() for row in rows]

    def _lengths(self, dialogues: np.ndarray) -> np.ndarray:
        """Input tokens of each dialogue, n_ctx at most: its turns and the [SEP]s between them."""
        starts, turns = self.shards.starts, self.shards.turns
        first, last = starts[dialogues], starts[dialogues + 1]
        n_separators = last - first - 1
        lengths = turns[last] - turns[first] + n_separators
        for i in (lengths > self.n_ctx).nonzero()[0]:
            turn_lengths = np.diff(turns[first[i] : last[i] + 1])
            lengths[i] = fit(turn_lengths.tolist(), self.n_ctx).length
        return lengths

    def _encode_row(self, row: Sequence[int]) -> list[Example]:
        cls_id, sep_id = self.tokenizer.cls_id, self.tokenizer.sep_id
        return [
            encode_example(self.shards.dialogue(i), cls_id, sep_id, self.n_ctx, self.targets)
            for i in row
        ]

    def _dialogue_batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Rows of dialogues, in each row one behind the other."""
        examples = [self._encode_row(row) for row in rows]
        length = self.n_ctx
        if not self.packed:
            length = max(len(row[0].targets) for row in examples)  # one dialogue a row
        shape = (len(rows), length)  # (B, T)
        ids = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        positions = np.zeros(shape, np.int64)
        segments = np.full(shape, -1, np.int32)
        targets = np.full(shape, IGNORE, np.int64)
        for row, examples_in_row in enumerate(examples):
            end = 0
            for segment, example in enumerate(examples_in_row):
                start = end
                end = start + len(example.targets)
                ids[row, start:end] = example.input_ids
                types[row, start:end] = example.token_type_ids
                positions[row, start:end] = np.arange(len(example.targets))
                segments[row, start:end] = segment
                targets[row, start:end] = example.targets
        return Batch(
            input_ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            n_targets=int((targets != IGNORE).sum()),
            n_tokens=int((segments >= 0).sum()),
            token_type_ids=torch.from_numpy(types),
            position_ids=torch.from_numpy(positions) if self.packed else None,
            segments=torch.from_numpy(segments) if self.packed else None,
        )


def _ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@contextmanager
def prefetch(
    batches: Batches, first: int, stop: int, per_step: int, indices: Sequence[int]
) -> Iterator[Iterator[list[Batch]]]:
    """Yields an iterator over this process's micro-batches of each of the steps first..stop-1.

    A step has `per_step` micro-batches, of which this process takes those with `indices`; an index
    of `per_step` or more stands for an empty one. A thread makes the next step's meanwhile.
    """

    def step_batches(step: int) -> list[Batch]:
        own = []
        for index in indices:
            if index < per_step:
                own.append(batches.micro_batch(step * per_step + index))
            else:
                own.append(batches.empty())
        return own

    with ThreadPoolExecutor(1) as executor:
        yield in_order(executor, step_batches, range(first, stop), ahead=2)
