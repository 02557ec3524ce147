"""Batches: a micro-batch is a pure function of (seed, number).

Training sees an endless sequence of rows, epoch after epoch (row_order.py). Micro-batch g holds the
`batch_size` rows from g * batch_size on, and micro-batch i of a step is number step * per_step + i.
Processes only divide these numbers among themselves. So there is no loader state to save: a resumed
run, or one with another number of processes, goes on with the same batches.

A row is a window of `n_ctx` tokens (lm), or whole dialogues packed into `n_ctx` positions (chatlm).
A packed dialogue's positions start at 0, and its segment number keeps attention inside it. How a
dialogue longer than `n_ctx` is cut is said in dialogue.py.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptchat.data.dialogue import IGNORE, Example, encode_example
from gptchat.data.encoding import in_order
from gptchat.data.row_order import (
    DialogueOrder,
    Excerpt,
    Mixture,
    WindowOrder,
    ceil_div,
)
from gptchat.data.shards import Shards
from gptchat.data.tokenizer import Tokenizer

TARGETS_MULTIPLE = 256  # of which the number of targets given to the model is a multiple


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, all tensors (B, T).

    `targets` holds the id that follows each position, or -100 (IGNORE). `segments` numbers the
    dialogues in a row from 0, with -1 for padding. `token_type_ids`, `position_ids` and `segments`
    are None for lm.
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
        `targets` (N,) are those targets. Positions without a target round N up to a multiple of
        TARGETS_MULTIPLE, since an allocator that meets ever new sizes hoards memory.
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


class Batches:
    """Micro-batches of `batch_size` rows of `n_ctx` positions each.

    `sources` are shards of one task; `weights` are the shares of several.
    """

    def __init__(
        self,
        sources: Sequence[Shards],
        tokenizer: Tokenizer,
        n_ctx: int,
        batch_size: int,
        seed: int = 0,
        targets: str = "response",
        weights: Sequence[float] = (),
    ):
        self.sources = sources
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.batch_size = batch_size
        self.targets = targets
        self.is_lm = sources[0].task == "lm"
        self.mixture = Mixture(weights if len(sources) > 1 else (1.0,))
        self.orders: list[WindowOrder | DialogueOrder] = []
        for shards in sources:
            if self.is_lm:
                self.orders.append(WindowOrder(shards, n_ctx, seed))
            else:
                self.orders.append(DialogueOrder(shards, n_ctx, seed, targets))

    @property
    def digest(self) -> str:
        return ",".join(shards.digest for shards in self.sources)

    @cached_property
    def rows_per_epoch(self) -> int:
        return sum(order.rows_per_epoch for order in self.orders)

    @property
    def varying_dimensions(self) -> tuple[str, ...]:
        """The dimensions of `Batch.inputs` that vary, as torch.compile names them."""
        if self.is_lm:
            return ()
        return ("L['targets']:0", "L['target_positions']:0")

    def steps_per_epoch(self, per_step: int) -> int:
        """Steps of `per_step` micro-batches in an epoch, rounded up."""
        return ceil_div(self.rows_per_epoch, self.batch_size * per_step)

    def micro_batch(self, number: int) -> Batch:
        numbers = range(number * self.batch_size, (number + 1) * self.batch_size)
        places = [self.mixture.place(row) for row in numbers]
        rows = [(self.sources[source], self.orders[source].row(row)) for source, row in places]
        if self.is_lm:
            return self._window_batch(rows)
        return self._dialogue_batch(rows)

    def evaluation(self) -> Iterator[Batch]:
        """Everything once, in order. The first token of a stream is predicted from [EOS]."""
        size = self.batch_size
        for shards, order in zip(self.sources, self.orders, strict=True):
            if isinstance(order, WindowOrder):
                starts = range(0, shards.n_tokens, self.n_ctx)
                for i in range(0, len(starts), size):
                    windows = [(shards, start) for start in starts[i : i + size]]
                    yield self._window_batch(windows, stop=shards.n_tokens)
            else:
                for rows in order.pools_in_order():
                    for i in range(0, len(rows), size):
                        yield self._dialogue_batch([(shards, row) for row in rows[i : i + size]])

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
        """UTF-8 bytes that `evaluation` predicts: the text's (lm) or the targets' (chatlm)."""
        if self.is_lm:
            return sum(shards.n_bytes for shards in self.sources)
        lengths = torch.tensor([len(data) for data in self.tokenizer.token_bytes])
        total = 0
        for batch in self.evaluation():
            targets = batch.targets[batch.targets != IGNORE]
            total += int(lengths[targets].sum())
        return total

    def _window_batch(self, rows: Sequence[tuple[Shards, Any]], stop: int | None = None) -> Batch:
        """Windows of these (source, position of the first target); no targets from `stop` on."""
        windows = [_circle(shards, start - 1, self.n_ctx + 1) for shards, start in rows]
        ids = torch.from_numpy(np.stack(windows))  # (B, T + 1)
        targets = ids[:, 1:].clone()
        if stop is not None:
            starts = torch.tensor([start for _, start in rows])
            positions = starts[:, None] + torch.arange(self.n_ctx)  # (B, T)
            targets[positions >= stop] = IGNORE
        n_targets = int((targets != IGNORE).sum())
        return Batch(ids[:, :-1].contiguous(), targets, n_targets, n_tokens=n_targets)

    def _encode_row(self, shards: Shards, row: Sequence[Excerpt]) -> list[Example]:
        examples = []
        for dialogue, first, last in row:
            turns = shards.dialogue(dialogue)[first:last]
            cls_id, sep_id = self.tokenizer.cls_id, self.tokenizer.sep_id
            examples.append(encode_example(turns, cls_id, sep_id, self.n_ctx, self.targets))
        return examples

    def _dialogue_batch(self, rows: Sequence[tuple[Shards, Any]]) -> Batch:
        """Rows of (source, excerpts)."""
        shape = (len(rows), self.n_ctx)  # (B, T)
        ids = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        positions = np.zeros(shape, np.int64)
        segments = np.full(shape, -1, np.int32)
        targets = np.full(shape, IGNORE, np.int64)
        for row, (shards, excerpts) in enumerate(rows):
            end = 0
            for segment, example in enumerate(self._encode_row(shards, excerpts)):
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
            position_ids=torch.from_numpy(positions),
            segments=torch.from_numpy(segments),
        )


def _circle(shards: Shards, start: int, length: int) -> np.ndarray:
    """`length` ids of the stream, whose beginning follows its end."""
    total = shards.n_tokens
    parts = []
    while length > 0:
        start %= total
        part = shards.tokens(start, min(start + length, total))
        parts.append(part)
        start += len(part)
        length -= len(part)
    return np.concatenate(parts).astype(np.int64)


@contextmanager
def prefetch(
    batches: Batches, first: int, stop: int, per_step: int, indices: Sequence[int]
) -> Iterator[Iterator[list[Batch]]]:
    """Yields an iterator over this process's micro-batches of each of the steps first..stop-1.

    Of the `per_step` micro-batches of a step it takes those with `indices`; an index of `per_step`
    or more gives an empty one. A thread makes those of the next step meanwhile.
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
