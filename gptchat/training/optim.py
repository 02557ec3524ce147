"""Parameter groups and the learning-rate schedule.

AdamW (Loshchilov & Hutter 2019, fused) with decay on matrices only. With `optimizer = "muon"` the matrices of the
blocks go to Muon instead (Jordan et al. 2024, torch.optim.Muon): their momentum is orthogonalised before the step.
"""

import math

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from gptchat.config import TrainConfig
from gptchat.model.gpt2 import GPT2


def make_optimizers(model: GPT2, config: TrainConfig) -> list[Optimizer]:
    """AdamW for all, or AdamW for embeddings, biases and norms beside Muon for the blocks' matrices.

    Each group holds the peak rate `peak_lr`; `set_learning_rate` scales it.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {
        name
        for name, p in parameters.items()
        if config.optimizer == "muon" and p.dim() == 2 and name.startswith("h.")
    }
    rest = [p for name, p in parameters.items() if name not in muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [
        AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    ]
    if muon:
        optimizers.append(
            Muon(
                [parameters[name] for name in sorted(muon)],
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                momentum=0.95,
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_scale(step: int, total: int, config: TrainConfig) -> float:
    """The share of the peak rate in `step` (from 0) of `total`: linear warm-up over the first `warmup_ratio` of the
    steps, then the schedule down to `min_lr_ratio`."""
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)  # 0..1
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left


def set_learning_rate(optimizers: list[Optimizer], scale: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def optimizer_state(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Every state tensor, named `optimizer.<which>.<parameter's number>.<key>`."""
    return {
        f"optimizer.{which}.{number}.{key}": value
        for which, optimizer in enumerate(optimizers)
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer_state(optimizers: list[Optimizer], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`; other names in `tensors` are passed over."""
    for which, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer" and rest.startswith(f"{which}."):
                _, number, key = rest.split(".", 2)
                state.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )


def clip_gradients(model: torch.nn.Module, max_grad_norm: float) -> Tensor:
    """Scale the gradients down to norm `max_grad_norm` (0: leave them). Returns the norm before, a scalar tensor."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
