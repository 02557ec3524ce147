"""The keys and values of many sequences, one tensor for all layers.

A slot holds one sequence, from position 0 on. A forward pass works on a `CacheView`: neighbouring
slots, each with the same number of new tokens, but each at its own position. A token attends to its
own position and those before it. So a position is written before anything attends to it: padding
tokens behind a sequence's end, and what a former sequence left there, are never seen, as long as
they are finite: the mask is added, and NaN plus minus infinity is NaN.

On a GPU a view reaches to the next multiple of LENGTH_STEP positions, behind a mask. So its shapes
repeat, which kernels and graphs are chosen by, and SDPA need not copy the mask to align its rows.
"""

import torch
from torch import Tensor

from gptchat.model.masks import additive_mask

LENGTH_STEP = 64


class KVCache:
    """Zeros (n_layer, 2, slots, n_head, length, head_dim): keys and values of `length`
    positions.
    """

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        head_dim: int,
        slots: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (n_layer, 2, slots, n_head, length, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.length_step = 1 if device.type == "cpu" else LENGTH_STEP

    def padded(self, length: int) -> int:
        """`length` rounded up to a multiple of `length_step`, at most the cache's length."""
        step = self.length_step
        return min(-(-length // step) * step, self.kv.shape[4])

    def clear(self, slot: int) -> None:
        """Zero a slot whose keys and values may be infinite or NaN."""
        self.kv[:, :, slot].zero_()

    def view(self, first: int, start: Tensor, n_new: int, length: int) -> "CacheView":
        """The n slots from `first` on, for a pass over T = `n_new` tokens in each.

        `start` (n,) are the positions of their first new tokens, `length` is max(start) + n_new, or
        more than that where `length_step` is above 1: no token attends to a position beyond. (The
        caller knows it without reading a tensor.)
        """
        return CacheView(self, first, start, n_new, length)


class CacheView:
    """What a forward pass sees of a cache: where its new tokens go, and what they may attend to.

    `length` is how far the view reaches. `position_ids` (n, T). `mask` (n, 1, T, length) is added
    to the scores: 0, or minus infinity where a token must not look. It is None for a single token
    of a single sequence that sees everything in view.
    """

    def __init__(self, cache: KVCache, first: int, start: Tensor, n_new: int, length: int):
        n_slots = len(start)
        device = start.device
        self.kv = cache.kv[:, :, first : first + n_slots]
        self.length = cache.padded(length)
        # A slice takes half the time of an index, but its place is no tensor.
        self.new_slice: slice | None = None
        if n_slots == 1 and cache.length_step == 1:
            self.new_slice = slice(length - n_new, length)
        self.slots = torch.arange(n_slots, device=device)[:, None]  # (n, 1)
        self.position_ids = start[:, None] + torch.arange(n_new, device=device)
        self.mask: Tensor | None = None
        if n_slots > 1 or n_new > 1 or self.new_slice is None:
            later = torch.arange(self.length, device=device) > self.position_ids[:, :, None]
            self.mask = additive_mask(later[:, None], cache.kv.dtype)

    def update(self, layer: int, new: Tensor) -> tuple[Tensor, ...]:
        """Store a layer's new keys and values (2, n, H, T, D).

        Returns all of its keys and all of its values so far, (n, H, length, D) each.
        """
        kv = self.kv[layer]  # (2, n, H, positions, D)
        if self.new_slice is not None:
            kv[:, :, :, self.new_slice] = new
        else:
            # Indexed by two tensors that are not side by side, it has the shape (n, T, 2, H, D).
            kv[:, self.slots, :, self.position_ids] = new.permute(1, 3, 0, 2, 4)
        return kv[:, :, :, : self.length].unbind()
