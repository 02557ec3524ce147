"""The keys and values of many sequences, in one tensor for all layers.

A slot holds one sequence, from position 0 on. A forward pass works on a `CacheView` of neighbouring
slots: each gets the same number of new tokens, at positions of its own. A token attends to its own
position and earlier ones. So padding after a sequence's end, and what an earlier sequence left
there, is never attended to. It must be finite, since the mask is added and NaN - inf is NaN.
"""

import torch
from torch import Tensor


class KVCache:
    """Zeros `kv` (n_layer, 2, slots, n_head, length, head_dim)."""

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
        self.positions = torch.arange(length, device=device)
        self.slots = torch.arange(slots, device=device)

    def clear(self, slot: int) -> None:
        """Zero a slot whose keys and values may be infinite or NaN."""
        self.kv[:, :, slot].zero_()

    def view(self, first: int, start: Tensor, n_new: int, length: int) -> "CacheView":
        """The n slots from `first` on, for a pass over T = `n_new` tokens in each.

        `start` (n,) holds the positions of their first new tokens. `length` is max(start) + n_new;
        the caller knows it without reading a tensor.
        """
        return CacheView(self, first, start, n_new, length)


class CacheView:
    """What a forward pass sees of a cache: `length` positions of n slots.

    `position_ids` (n, T) are those of the new tokens. `unseen` (n, 1, T, length) is true where a
    token must not look. It is None for a single token of a single sequence, which sees everything.
    """

    def __init__(self, cache: KVCache, first: int, start: Tensor, n_new: int, length: int):
        n_slots = len(start)
        seen = cache.kv[:, :, first : first + n_slots, :, :length]
        self.dtype = seen.dtype
        self.position_ids = start[:, None] + cache.positions[:n_new]
        self.unseen: Tensor | None = None
        if n_slots > 1 or n_new > 1:
            later = cache.positions[:length] > self.position_ids[:, :, None]
            self.unseen = later[:, None]
        self._layers = seen.unbind()  # (2, n, H, length, D) each
        self._slots = cache.slots[:n_slots, None]
        # Of one sequence, the new positions are a slice: half the time of writing to an index.
        self._new = seen[..., length - n_new :, :].unbind() if n_slots == 1 else None

    def update(self, layer: int, new: Tensor) -> tuple[Tensor, ...]:
        """Store a layer's new keys and values (2, n, H, T, D).

        Returns all of its keys and all of its values so far, (n, H, length, D) each.
        """
        kv = self._layers[layer]
        if self._new:
            self._new[layer].copy_(new)
        else:
            # Indexed by two tensors that are not side by side, it has the shape (n, T, 2, H, D).
            kv[:, self._slots, :, self.position_ids] = new.permute(1, 3, 0, 2, 4)
        return kv.unbind()
