"""Ends a run whose loss, gradients or weights are no longer finite numbers.

What went wrong is neither trained on nor saved: gradient norms are collected on the device, and
checked with the loss wherever it is read anyway, before every line of the log and every save. The
last good checkpoint and the best model stay as they are.
"""

import math
import sys
from typing import NoReturn

import torch
from torch import Tensor

from gptchat.console import RunFailed
from gptchat.training.distributed import World

WHAT_TO_CHANGE = (
    "the same command repeats the same steps; to go on, lower train.learning_rate, "
    "train.muon_learning_rate or train.max_grad_norm, or change train.precision"
)


class HealthCheck:
    """Watches the numbers of one run in `folder`, whose checkpoint is of step `saved_step`.

    With `skips_overflows` (fp16), steps whose gradients are not finite change no weight, and their
    gradient norms are passed over.
    """

    def __init__(self, folder: str, world: World, saved_step: int, skips_overflows: bool):
        self.folder = folder
        self.world = world
        self.saved_step = saved_step
        self.skips_overflows = skips_overflows
        self.last_values = ""  # those that were checked last
        self.largest_norm = torch.zeros((), device=world.device)

    def count_step(self, grad_norm: Tensor) -> None:
        """Take a step's gradient norm into account, without waiting for the device."""
        if not self.skips_overflows:
            self.largest_norm = torch.maximum(self.largest_norm, grad_norm)  # NaN stays NaN

    def sum_losses(self, step: int, own_loss_sum: Tensor, n_targets: int) -> float:
        """The sum of `own_loss_sum` over all processes, over `n_targets` targets of them all.

        Raises RunFailed where it or a gradient norm since the run began is not finite.
        """
        loss_sum, norm = self.world.sum(float(own_loss_sum), float(self.largest_norm))
        loss = loss_sum / max(1, n_targets)
        self.check(step, {"loss": loss, "largest gradient norm": norm / self.world.size})
        return loss_sum

    def check_weights(self, step: int, model: torch.nn.Module) -> None:
        """Raise RunFailed where a weight is not finite."""
        norm = torch.nn.utils.get_total_norm(model.parameters())
        self.check(step, {"norm of the weights": float(norm)})

    def check(self, step: int, values: dict[str, float]) -> None:
        """Raise RunFailed where one of the named values after `step` is not finite."""
        shown = f"at step {step}: "
        shown += ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not all(math.isfinite(value) for value in values.values()):
            self._fail(shown)
        self.last_values = shown

    def _fail(self, found: str) -> NoReturn:
        if self.world.rank > 0:
            sys.exit(1)  # all processes know it; the first one says it
        kept = "there is no checkpoint yet"
        if self.saved_step:
            kept = f"the checkpoint of step {self.saved_step} and the best model are kept"
        before = ""
        if self.last_values:
            before = f" (before, {self.last_values})"
        raise RunFailed(
            f"{self.folder}: found {found}{before}; wanted finite numbers; {kept}; {WHAT_TO_CHANGE}"
        )
