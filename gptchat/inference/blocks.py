"""The best of many scores, and a draw among many weights, found block by block.

A row of a whole vocabulary is read once, to reduce each block of BLOCK neighbours to its maximum or
sum. The result lies in one block, so no cumulative row is needed. (For 32 rows of 50,257 entries,
torch's own `max` or `cumsum` takes seven times as long.)

Each row's result depends only on that row. On a GPU the summation order can depend on the number of
rows, so results may differ by rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 256
# The integer for a weight of 1. Integers add up exactly, in any order; 2**19 of these are exact in
# float64, too.
ONE = 2.0**34


def reduce_blocks(reduce: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`reduce` (torch.amax, torch.sum) of each block of x (R, K): (R, K / BLOCK, rounded up)."""
    n_whole = x.shape[1] // BLOCK
    whole = x[:, : n_whole * BLOCK].unflatten(1, (n_whole, BLOCK))
    parts = [reduce(whole, -1)]
    rest = x[:, n_whole * BLOCK :]
    if rest.shape[1]:
        parts.append(reduce(rest, -1, keepdim=True))
    return torch.cat(parts, dim=1)


def take_block(x: Tensor, block: Tensor, missing: float) -> tuple[Tensor, Tensor]:
    """The entries (R, BLOCK) of one `block` (R, 1) per row of x (R, K), and their places there.

    Entries past the end of the row are `missing`, their places the row's last.
    """
    places = block * BLOCK + torch.arange(BLOCK, device=x.device)
    is_missing = places >= x.shape[1]
    places.clamp_max_(x.shape[1] - 1)
    return x.gather(1, places).masked_fill_(is_missing, missing), places


def best(scores: Tensor) -> Tensor:
    """The place (R, 1) of the highest score of each row (R, K), the first of equal ones."""
    block = reduce_blocks(torch.amax, scores).max(-1, keepdim=True).indices
    entries, places = take_block(scores, block, missing=-torch.inf)
    return places.gather(1, entries.max(-1, keepdim=True).indices)


def block_sums(weights: Tensor) -> Tensor:
    """The sums of the blocks of weights (R, K) up to 1, as int64 multiples of 1 / ONE."""
    return reduce_blocks(torch.sum, weights).mul_(ONE).long()


def draw_place(weights: Tensor, sums: Tensor, noise: Tensor) -> Tensor:
    """A place (R, 1) per row, drawn in proportion to float32 `weights` (R, K).

    `sums` are their `block_sums`. The inverse of the cumulative distribution turns `noise` (R, 1),
    float64 in [0, 1), into a place. An entry of weight 0 is never drawn; if all sums are 0, the
    place is arbitrary.
    """
    cumulative = sums.cumsum(-1)
    aim = noise * cumulative[:, -1:]  # less than the total, rounded too
    block = invert(cumulative, aim)
    # The noise's position within the block's share is a new number in [0, 1).
    weight = sums.gather(1, block)
    share = (aim - (cumulative.gather(1, block) - weight)) / weight
    entries, places = take_block(weights, block, missing=0.0)
    # A block may hold only small weights, so they are scaled by their largest.
    entries.mul_(ONE / entries.amax(-1, keepdim=True))
    cumulative = entries.long().cumsum(-1)
    return places.gather(1, invert(cumulative, share * cumulative[:, -1:]))


def invert(cumulative: Tensor, aim: Tensor) -> Tensor:
    """The index (R, 1) of the first integer above `aim` (R, 1) in cumulative rows (R, K)."""
    index = torch.searchsorted(cumulative, aim.long(), right=True)
    return index.clamp_max_(cumulative.shape[1] - 1)  # beyond the end where all is NaN
