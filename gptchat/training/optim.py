"""Optimizers, the learning-rate schedule, and optimizer state under the names of its parameters.

AdamW (Loshchilov & Hutter 2019, fused) updates every parameter, with weight decay on matrices only.
With `optimizer = "muon"` the matrices of the transformer blocks go to Muon instead. The learning
rate is a function of the step number.

Muon orthogonalises in bfloat16 if the device multiplies that. Rounding differences then grow: after
six steps the weights of two processes, which sum gradients in another order, differ from those of
one by 2e-3, with Muon in float32 or AdamW by 7e-6.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gptchat.config import TrainConfig
from gptchat.model.gpt2 import GPT2
from gptchat.runtime import multiplies_bfloat16
from gptchat.training.muon import Muon

BETAS = (0.9, 0.95)  # AdamW's decay of the mean gradient and of the mean squared gradient
# Progress after the warm-up, 0 to 1 -> the rate between its minimum (0) and its peak (1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


class Optimizers(Optimizer):
    """Several optimizers as one: fp16's loss scaler skips the step of all or of none.

    Each group keeps its peak rate as `peak_lr`; `set_learning_rate` scales it.
    """

    def __init__(self, optimizers: list[Optimizer]):
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


def make_optimizers(model: GPT2, config: TrainConfig) -> Optimizers:
    """AdamW for all parameters, or AdamW and Muon, which takes the matrices of the blocks."""
    fused_matrices: list[Tensor] = []  # of queries, keys and values, for Muon
    muon_matrices: list[Tensor] = []  # the blocks' others, for Muon
    embeddings: list[Tensor] = []  # of tokens; the output head shares it
    matrices: list[Tensor] = []  # all others
    vectors: list[Tensor] = []  # biases and LayerNorms
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif config.optimizer == "muon" and name.endswith("attn.c_attn.weight"):
            fused_matrices.append(parameter)
        elif config.optimizer == "muon" and name.startswith("h."):
            muon_matrices.append(parameter)
        elif name == "wte.weight":
            embeddings.append(parameter)
        else:
            matrices.append(parameter)
    embedding_rate = config.embedding_learning_rate or config.learning_rate
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": embeddings, "weight_decay": config.weight_decay, "lr": embedding_rate},
    ]
    optimizers: list[Optimizer] = [AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=True)]
    if muon_matrices:
        fast = torch.bfloat16 if multiplies_bfloat16(muon_matrices[0].device) else torch.float32
        muon = Muon(
            [{"params": fused_matrices, "parts": 3}, {"params": muon_matrices}],
            lr=config.muon_learning_rate,
            weight_decay=config.weight_decay,
            dtype=fast,
        )
        optimizers.append(muon)
    return Optimizers(optimizers)


def lr_scale(step: int, total_steps: int, config: TrainConfig) -> float:
    """The share of the peak learning rate in `step`, counted from 0.

    It grows linearly in the first `warmup_ratio` of all steps, then follows the schedule.
    """
    warmup_steps = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    height = SCHEDULES[config.schedule](progress)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * height


def set_learning_rate(optimizer: Optimizers, scale: float) -> None:
    """Set every group's rate to `scale` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale


def clip_gradients(model: torch.nn.Module, max_grad_norm: float) -> Tensor:
    """Scale the gradients down to norm `max_grad_norm`; 0 leaves them as they are.

    Returns the norm before, a scalar tensor.
    """
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)


def optimizer_state(model: GPT2, optimizer: Optimizers) -> dict[str, Tensor]:
    """Every state tensor by name, such as `optimizer.adamw.h.0.ln_1.weight.exp_avg`."""
    tensors: dict[str, Tensor] = {}
    for prefix, parameter, state in _named_states(model, optimizer):
        for key, value in state.get(parameter, {}).items():
            tensors[f"{prefix}{key}"] = value
    return tensors


def load_optimizer_state(model: GPT2, optimizer: Optimizers, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`; other tensors are ignored."""
    by_prefix: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        prefix, dot, key = name.rpartition(".")
        by_prefix.setdefault(prefix + dot, {})[key] = value
    for prefix, parameter, state in _named_states(model, optimizer):
        for key, value in by_prefix.get(prefix, {}).items():
            state[parameter][key] = value.to(parameter.device)


def _named_states(model: GPT2, optimizer: Optimizers) -> Iterator[tuple[str, Tensor, dict]]:
    """Prefix of its tensors' names, parameter and optimizer's state, for every parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for one in optimizer.optimizers:
        kind = type(one).__name__.lower()
        for group in one.param_groups:
            for parameter in group["params"]:
                yield f"optimizer.{kind}.{names[parameter]}.", parameter, one.state
