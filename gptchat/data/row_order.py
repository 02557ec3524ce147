"""The order of rows: a row's number in an endless sequence -> what the row holds, without state.

An epoch holds every row of a source, the shards of one split, once. Permutations are computed from
a key, so memory is nearly flat.

- WindowOrder (lm): each epoch cuts the stream of tokens, as a circle, into windows of `n_ctx`
  tokens, from an offset of its own, and shuffles them. The last one repeats up to n_ctx - 1 tokens.
- DialogueOrder (chatlm): dialogues are dealt at random into pools, the same in all epochs. Those of
  a pool are packed into rows of `n_ctx` tokens, longest first, by best fit (99 % full with the
  default corpora); one that is longer than a row is cut into excerpts. Each epoch shuffles the
  pools, the dialogues in one before they are packed, and its rows.
- Mixture: several sources give fixed shares of the rows, spread evenly.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from gptchat.data.dialogue import excerpts, fit
from gptchat.data.keyed_draw import draw_key, permute
from gptchat.data.shards import Shards

POOL = 1024  # dialogues packed together
MIXTURE_ROWS = 1000  # rows of a block in which each source has exactly its share


class Excerpt(NamedTuple):
    """Turns first..last-1 of a dialogue: all, unless it is longer than a row."""

    dialogue: int
    first: int
    last: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths`, none above `capacity`, in rows: best fit, longest first.

    The number of rows does not depend on the order of the lengths.
    """
    rows: list[list[int]] = []
    # rows_with_space[s]: indices of the rows with s free positions
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


class WindowOrder:
    """The windows of a stream of tokens (lm)."""

    def __init__(self, shards: Shards, n_ctx: int, seed: int):
        self.n_ctx = n_ctx
        self.seed = seed
        self.rows_per_epoch = ceil_div(shards.n_tokens, n_ctx)

    def row(self, number: int) -> int:
        """The position in the stream of the first target of a row."""
        epoch, row = divmod(number, self.rows_per_epoch)
        key = draw_key(self.seed, epoch)
        window = int(permute(np.array([row]), self.rows_per_epoch, key)[0])
        offset = draw_key(self.seed, epoch, "offset") % self.n_ctx
        return window * self.n_ctx + offset


class DialogueOrder:
    """The rows of a split of dialogues (chatlm), of one excerpt or several each."""

    def __init__(self, shards: Shards, n_ctx: int, seed: int, targets: str):
        self.shards = shards
        self.n_ctx = n_ctx
        self.seed = seed
        self.targets = targets
        # Rows are asked for in ascending order, so one epoch and one pool are kept.
        self._epoch_pools = lru_cache(1)(self._order_pools)
        self._pool_rows = lru_cache(1)(self._pack_pool)

    @cached_property
    def rows_per_epoch(self) -> int:
        return int(self._rows_per_pool.sum())

    def row(self, number: int) -> list[Excerpt]:
        epoch, row = divmod(number, self.rows_per_epoch)
        pools, first_rows = self._epoch_pools(epoch)
        place = int(np.searchsorted(first_rows, row, side="right")) - 1
        return self._pool_rows(epoch, int(pools[place]))[row - int(first_rows[place])]

    def pools_in_order(self) -> Iterator[list[list[Excerpt]]]:
        """The rows of all dialogues in the order of the file, packed POOL by POOL."""
        for first in range(0, self.shards.documents, POOL):
            yield self._pack(np.arange(first, min(first + POOL, self.shards.documents)))

    def _order_pools(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pools in the order of an epoch, and the number of each one's first row in it."""
        n_pools = len(self._rows_per_pool)
        pools = permute(np.arange(n_pools), n_pools, draw_key(self.seed, epoch))
        n_rows = self._rows_per_pool[pools]
        return pools, np.cumsum(n_rows) - n_rows

    def _pack_pool(self, epoch: int, pool: int) -> list[list[Excerpt]]:
        key = draw_key(self.seed, epoch, pool)
        dialogues = self._dialogues_of_pool(pool)
        dialogues = dialogues[permute(np.arange(len(dialogues)), len(dialogues), key)]
        rows = self._pack(dialogues)
        return [rows[i] for i in permute(np.arange(len(rows)), len(rows), key)]

    @cached_property
    def _rows_per_pool(self) -> np.ndarray:
        n_pools = ceil_div(self.shards.documents, POOL)
        return np.array([len(self._pack(self._dialogues_of_pool(pool))) for pool in range(n_pools)])

    def _dialogues_of_pool(self, number: int) -> np.ndarray:
        n = self.shards.documents
        places = np.arange(number * POOL, min((number + 1) * POOL, n))
        return permute(places, n, draw_key(self.seed, "pools"))

    def _pack(self, dialogues: np.ndarray) -> list[list[Excerpt]]:
        parts, lengths = self._excerpts(dialogues)
        return [[parts[i] for i in row] for row in pack(lengths, self.n_ctx)]

    def _excerpts(self, dialogues: np.ndarray) -> tuple[list[Excerpt], list[int]]:
        """The excerpts of these dialogues and the input tokens of each, n_ctx at most."""
        starts, turns = self.shards.starts, self.shards.turns
        first, last = starts[dialogues], starts[dialogues + 1]
        n_separators = last - first - 1
        whole_lengths = turns[last] - turns[first] + n_separators
        parts: list[Excerpt] = []
        lengths: list[int] = []
        for i, length in enumerate(whole_lengths.tolist()):
            number, n_turns = int(dialogues[i]), int(last[i] - first[i])
            if length <= self.n_ctx:
                parts.append(Excerpt(number, 0, n_turns))
                lengths.append(length)
                continue
            turn_lengths = np.diff(turns[first[i] : last[i] + 1]).tolist()
            speakers = self.shards.speakers[first[i] : last[i]].tolist()
            for begin, end in excerpts(turn_lengths, speakers, self.n_ctx, self.targets):
                parts.append(Excerpt(number, begin, end))
                lengths.append(fit(turn_lengths[begin:end], self.n_ctx).length)
        return parts, lengths


class Mixture:
    """Which source each row comes from.

    Every block of MIXTURE_ROWS rows holds each source's share, rounded to whole rows but at least
    one, spread evenly over the block.
    """

    def __init__(self, weights: Sequence[float]):
        shares = np.array(weights, np.float64) / sum(weights)
        ends = np.rint(np.cumsum(shares) * MIXTURE_ROWS).astype(int)
        self.counts = np.maximum(1, np.diff(ends, prepend=0)).tolist()  # rows of a block, by source
        # Row j of a source's n comes at (j + 1/2) / n of the block.
        moments = []
        for source, n in enumerate(self.counts):
            moments += [((j + 0.5) / n, source, j) for j in range(n)]
        self.block = [(source, j) for _, source, j in sorted(moments)]

    def place(self, row: int) -> tuple[int, int]:
        """(source, number of the row in that source's own sequence)."""
        block, i = divmod(row, len(self.block))
        source, j = self.block[i]
        return source, block * self.counts[source] + j
