"""Keys and values of many sequences."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `slots` sequences, `length` positions each: one tensor (layers, 2, slots, H, length, D)."""

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        head_dim: int,
        slots: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (n_layer, 2, slots, n_head, length, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)

    def view(self, first: int, start: Tensor, n_new: int, longest: int) -> "CacheView":
        """The slots first..first+n-1, whose next `n_new` tokens stand at `start` (n,) and after. Attention reaches over
        the first `longest` = max(start) + n_new positions."""
        return CacheView(self, first, start, n_new, longest)


class CacheView:
    """What one forward pass sees of a cache: where its tokens go, and which positions each of them may look at."""

    def __init__(self, cache: KVCache, first: int, start: Tensor, n_new: int, longest: int):
        self.kv, self.new = (
            cache.kv[:, :, first : first + len(start)],
            slice(longest - n_new, longest),
        )
        self.position_ids = start[:, None] + torch.arange(n_new, device=start.device)  # (n, T)
        self.rows = torch.arange(len(start), device=start.device)[:, None]  # (n, 1)
        self.mask: Tensor | None = None  # (n, 1, T, longest); one row with one token sees all of it
        if len(start) > 1 or n_new > 1:
            unseen = torch.arange(longest, device=start.device) > self.position_ids[:, :, None]
            self.mask = torch.zeros(unseen.shape, dtype=cache.kv.dtype, device=start.device)
            self.mask = self.mask.masked_fill_(unseen, -torch.inf)[:, None]

    def update(self, layer: int, new: Tensor) -> tuple[Tensor, ...]:
        """Store the new keys and values (2, n, H, T, D); return all keys and all values: (n, H, longest, D) each."""
        kv = self.kv[layer]
        if len(self.rows) == 1:  # a plain copy takes half the time
            kv[:, :, :, self.new] = new
        else:
            kv[:, self.rows, :, self.position_ids] = new.permute(1, 3, 0, 2, 4)
        return kv[:, :, :, : self.new.stop].unbind()
