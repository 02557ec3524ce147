"""Token-weighted loss, perplexity and bits per byte."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from gptchat.data.batches import Batch


@dataclass(frozen=True)
class Metrics:
    """Of target tokens: mean loss in nats, perplexity e^loss, bits per byte of what the targets stand for."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    n_targets: int
    n_bytes: int | None


def metrics(loss_sum: float, n_targets: int, n_bytes: int | None = None) -> Metrics:
    """Figures of a sum of cross-entropies in nats; NaN where there is no target."""
    loss = loss_sum / n_targets if n_targets else math.nan
    bits_per_byte = loss_sum / math.log(2) / n_bytes if n_bytes else None
    return Metrics(
        loss, math.inf if loss > 700 else math.exp(loss), bits_per_byte, n_targets, n_bytes
    )


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager:
    """The context in which a forward pass runs in "bf16", "fp16" or "fp32" (no autocast)."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


@torch.no_grad()
def sum_losses(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> tuple[float, int]:
    """The sum of the cross-entropies (nats) over all targets of `batches` and their number, without dropout."""
    training, n_targets = model.training, 0
    total = torch.zeros(
        (), dtype=torch.float64, device=device
    )  # a list of losses would pin the heap batch by batch
    model.eval()
    for batch in batches:
        with autocast(device, precision):
            total += model(**batch.inputs(device))
        n_targets += batch.n_targets
    model.train(training)
    return float(total), n_targets
