"""The figures of a model on text: token-weighted loss, perplexity and bits per byte; and the precisions of its passes.

`sum_losses` adds up the cross-entropies of batches, `metrics` turns such a sum into figures. A sum and its number of
targets may be added to those of other batches or processes first: the mean weighs every target token alike.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from gptchat.data.batches import Batch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    """The context in which a forward pass runs in a precision of `PRECISIONS`; "fp32" is no autocast."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, PRECISIONS[precision])


@torch.no_grad()
def sum_losses(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> tuple[float, int]:
    """The sum of the cross-entropies (nats) over all targets of `batches`, without dropout, and their number."""
    was_training = model.training
    model.eval()
    n_targets = 0
    # A list of the batches' losses would pin the heap batch by batch.
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        with autocast(device, precision):
            total += model(**batch.inputs(device))
        n_targets += batch.n_targets
    model.train(was_training)
    return float(total), n_targets
