"""Cross-entropy that overwrites its logits with their gradient, to save time and memory.

`summed_cross_entropy(logits, targets)` destroys the logits: they may not be read afterwards, and
the loss may be differentiated only once. RuntimeError is raised by a backward pass through logits
that were used before or after, by a second backward pass, and by a second derivative. Whatever
reads the logits afterwards without a gradient, such as `logits.argmax()`, reads the gradient
unnoticed.
"""

from typing import Any

import torch
from torch import Tensor

CPU_ROWS = 32  # rows whose logits stay in the CPU's cache while they become their gradient
GPU_ROWS = 1024
IGNORED = -100  # the target of a row that does not count, as for F.cross_entropy


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of targets (N,) under logits (N, V): a scalar, at least float32.

    Overwrites `logits`. Targets of -100 do not count, whatever their logits are. Raises ValueError
    for another target that is no id; on a GPU, where looking at a value would wait for the device,
    the gather kernel asserts it.
    """
    if targets.is_cpu:
        check_targets(targets, logits.shape[1])
    loss, _ = CrossEntropy.apply(logits, targets)
    return loss


def check_targets(targets: Tensor, vocab_size: int) -> None:
    is_wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= vocab_size)
    if is_wrong.any():
        found = int(targets[is_wrong][0])
        raise ValueError(f"found the target {found}, wanted 0 to {vocab_size - 1}, or {IGNORED}")


class CrossEntropy(torch.autograd.Function):
    """Returns the loss, and the logits, which hold their gradient by then.

    Autograd wants an input that is changed in place to be an output, too. A later use of the logits
    is a use of that output, whose gradient `backward` refuses. F.cross_entropy takes twice the time
    and holds three more tensors of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        dtype = at_least_float32(logits.dtype)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        n_rows = CPU_ROWS if logits.device.type == "cpu" else GPU_ROWS
        ids = targets[:, None]  # (N, 1)
        ignored = ids == IGNORED
        # Looking whether there are any would wait for a GPU.
        any_ignored = not targets.is_cpu or bool(ignored.any())
        if any_ignored:
            ids = ids.masked_fill(ignored, 0)
        parts = (logits.split(n_rows), ids.split(n_rows), ignored.split(n_rows))
        for chunk, chunk_ids, chunk_ignored in zip(*parts, strict=True):  # (rows, V), (rows, 1) x 2
            probabilities = chunk.softmax(-1, dtype)
            # the largest probability is exp(largest logit - logsumexp)
            logsumexp = chunk.amax(-1, True) - probabilities.amax(-1, True).log()
            losses = logsumexp - chunk.gather(1, chunk_ids)
            minus_one = probabilities.new_full(chunk_ids.shape, -1)
            gradient = probabilities.scatter_add_(1, chunk_ids, minus_one)
            if any_ignored:
                losses.masked_fill_(chunk_ignored, 0)  # times 0 a NaN would stay NaN
                gradient.masked_fill_(chunk_ignored, 0)
            total += losses.sum()
            chunk.copy_(gradient)
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits)
        return total, logits

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, grad_of_logits: Tensor | None
    ) -> tuple[Tensor, None]:
        if grad is None or grad_of_logits is not None:
            raise RuntimeError(
                "logits were used after their cross-entropy, which overwrites them; "
                "take what else you need from a copy made before"
            )
        if torch.is_grad_enabled():  # create_graph=True: `once_differentiable` lets some pass
            raise RuntimeError("this cross-entropy has no second derivative; use F.cross_entropy")
        (gradient,) = ctx.saved_tensors
        return gradient.detach().mul_(grad), None
