"""What tells attention where a query may look: a tensor added to the scores, or a block mask.

The tensor is the reference. `document_block_mask` is the same for documents packed into rows, for a
GPU: flex_attention then leaves out the blocks that no query may look at, and no (B, 1, T, T) tensor
is made, which keeps scaled_dot_product_attention from its flash kernel. That has not run on a
GPU yet; flex_attention has no gradient on a CPU, so `tests/test_cuda.py` is the first to test it.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

ALIGNMENT = 8  # elements, of the rows of a mask that SDPA's kernels for GPUs read
MIN_HEAD_DIM = 16  # of flex_attention's kernel


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where `hidden` (..., T, S) is true, else 0, to be added to the scores.

    Its rows begin at multiples of ALIGNMENT: SDPA would copy another mask in every layer.
    """
    length = hidden.shape[-1]
    padded = length + -length % ALIGNMENT
    mask = torch.zeros(*hidden.shape[:-1], padded, dtype=dtype, device=hidden.device)
    return mask[..., :length].masked_fill_(hidden, -torch.inf)


def packed_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask (B, 1, T, T) of `segments` (B, T).

    A token sees itself and the tokens before it that have its number.
    """
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same_document = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return additive_mask(~(earlier & same_document)[:, None], dtype)


def use_block_mask(device: torch.device, head_dim: int, dropout: float) -> bool:
    """Whether packed rows take flex_attention: in a compiled model on a GPU, without dropout.

    Not compiled, flex_attention makes all scores (B, H, T, T); it has no dropout.
    """
    is_compiled_on_gpu = device.type == "cuda" and torch.compiler.is_compiling()
    return is_compiled_on_gpu and head_dim >= MIN_HEAD_DIM and dropout == 0


def document_block_mask(segments: Tensor) -> BlockMask:
    """`packed_mask` of `segments` (B, T) in the form that flex_attention takes."""

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments[row, query] == segments[row, key])

    rows, length = segments.shape
    return create_block_mask(is_visible, rows, None, length, length, device=segments.device)
