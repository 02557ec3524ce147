"""The figures of a model on text: token-weighted loss, perplexity and bits per byte.

`sum_losses` adds up the cross-entropies of batches; `metrics` turns such a sum into figures. Sums
and numbers of targets may be added over processes in between, so every target token counts alike.
`PRECISIONS` and `autocast` say in which dtype a forward pass multiplies.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from gptchat.data.batches import Batch
from gptchat.runtime import multiplies_bfloat16

# The values of [train] precision, but for "auto".
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Metrics:
    loss: float  # mean cross-entropy in nats
    perplexity: float  # e^loss
    bits_per_byte: float | None  # the loss of all targets in bits / n_bytes
    n_targets: int
    n_bytes: int | None  # UTF-8 bytes of the targets' text


def metrics(loss_sum: float, n_targets: int, n_bytes: int | None = None) -> Metrics:
    """Figures of a sum of cross-entropies in nats.

    The loss is NaN if there are no targets, bits per byte None if the bytes are not known.
    """
    loss = loss_sum / n_targets if n_targets else math.nan
    perplexity = math.inf if loss > 700 else math.exp(loss)  # a float ends at e^709
    bits_per_byte = None
    if n_bytes:
        bits_per_byte = loss_sum / math.log(2) / n_bytes
    return Metrics(loss, perplexity, bits_per_byte, n_targets, n_bytes)


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """One of `PRECISIONS`; "auto" is bf16 if the device multiplies that, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bfloat16(device) else "fp32"


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager:
    """The context of a forward pass in one of `PRECISIONS`; with "fp32" it does nothing."""
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
    """The sum of the cross-entropies (nats) of all targets of `batches`, and their number.

    The model runs without dropout; its mode is restored.
    """
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
