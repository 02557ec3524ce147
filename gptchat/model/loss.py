"""Cross-entropy that overwrites its logits with their gradient, to save time and memory.

`summed_cross_entropy(logits, targets)` DESTROYS the logits it is given: they may not be read again,
and the loss may be differentiated only once. Autograd is told so: a backward pass through logits
that were used before or after, a second one, or a second derivative raises RuntimeError. (What
reads the logits without a gradient, as `logits.argmax()`, is not noticed and reads the gradient.)
The loss is a sum over target tokens; the caller divides it by their number.
"""

from typing import Any

import torch
from torch import Tensor

CPU_ROWS = 32  # rows of logits that become their gradient together without leaving the CPU's cache
GPU_ROWS = 1024
IGNORED = -100  # the target of a row that does not count, as for F.cross_entropy


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of targets (N,) under logits (N, V): a scalar, at least float32.

    OVERWRITES `logits`. Targets of -100 do not count, whatever their logits are. Raises ValueError
    for another target that is no id. On other devices than the CPU that is an assertion of the
    device's gather kernel, since looking at a value would wait for the device at every step.
    """
    if targets.is_cpu:
        check_targets(targets, logits.shape[1])
    loss, _ = CrossEntropy.apply(logits, targets)
    return loss


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a target (N,) is neither -100 nor an id."""
    is_wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= vocab_size)
    if is_wrong.any():
        found = int(targets[is_wrong][0])
        raise ValueError(f"found the target {found}, wanted 0 to {vocab_size - 1}, or {IGNORED}")


class CrossEntropy(torch.autograd.Function):
    """Returns the loss, and the logits, which hold their gradient by then and may not be used.

    Autograd requires that an input which is changed in place is also an output. A use of the logits
    afterwards becomes a use of that output, whose gradient `backward` refuses.

    The gradient is made some rows at a time: F.cross_entropy takes twice the time, and holds three
    more tensors of the logits' size, 0.45 GB for 1,024 targets and 50,257 vocabulary entries.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        dtype = at_least_float32(logits.dtype)
        total = torch.zeros((), dtype=dtype, device=logits.device)
        n_rows = GPU_ROWS
        if logits.device.type == "cpu":
            n_rows = CPU_ROWS
        ids = targets[:, None]  # (N, 1)
        ignored = ids == IGNORED
        # A GPU would be waited for to look whether there are any.
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
        ctx.save_for_backward(logits)  # which hold their gradient by now
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
