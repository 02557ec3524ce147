"""The keys and values of many sequences, one tensor for all layers.

A slot holds one sequence, from position 0 on. A forward pass works on a `CacheView`: neighbouring
slots, each with the same number of new tokens, but each at its own position. A token attends to its
own position and those before it, so a position is written before anything attends to it. Padding
behind a sequence's end and what a former sequence left there are never seen, as long as they are
finite: the mask is added, and NaN plus minus infinity is NaN.
"""

import torch
from torch import Tensor


class KVCache:
    """Zeros (n_layer, 2, slots, n_head, length, head_dim): the keys and values of `length`
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

    def clear(self, slot: int) -> None:
        """Zero a slot whose keys and values may be infinite or NaN."""
        self.kv[:, :, slot].zero_()

    def view(self, first: int, start: Tensor, n_new: int, length: int) -> "CacheView":
        """The n slots from `first` on, for a pass over T = `n_new` tokens in each.

        `start` (n,) are the positions of their first new tokens. `length` is max(start) + n_new;
        the caller knows it without reading a tensor.
        """
        return CacheView(self, first, start, n_new, length)


class CacheView:
    """What a forward pass sees of a cache: `length` positions of n slots.

    `position_ids` (n, T) are those of the new tokens. `unseen` (n, 1, T, length) is true where a
    token must not look; None for a single token of a single sequence, which sees all.
    """

    def __init__(self, cache: KVCache, first: int, start: Tensor, n_new: int, length: int):
        n_slots = len(start)
        device = start.device
        self.kv = cache.kv[:, :, first : first + n_slots]
        self.length = length
        self.new_slice: slice | None = None
        if n_slots == 1:  # writing to a slice takes half the time of writing to an index
            self.new_slice = slice(length - n_new, length)
        self.slots = torch.arange(n_slots, device=device)[:, None]  # (n, 1)
        self.position_ids = start[:, None] + torch.arange(n_new, device=device)
        self.unseen: Tensor | None = None
        if n_slots > 1 or n_new > 1:
            later = torch.arange(length, device=device) > self.position_ids[:, :, None]
            self.unseen = later[:, None]

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
