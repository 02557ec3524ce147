"""Optimizers, the learning-rate schedule, and optimizer state under the names of its parameters.

AdamW (Loshchilov & Hutter 2019, fused) updates every parameter, with weight decay on matrices only.
With `optimizer = "muon"` the matrices of the transformer blocks go to Muon instead (muon.py), which
orthogonalises their momentum before each step, the queries', keys' and values' matrices apart. The
learning rate is a pure function of the step number.

Muon orthogonalises in bfloat16 where the device multiplies that, whatever the precision of the run,
and so makes rounding larger: two processes sum gradients in another order than one, and after six
steps their weights differ by 2e-3 (2 % of a matrix) with Muon, by 6e-6 with AdamW. With the same
iteration in float32, which other devices use, they differ by 7e-6. A resumed run with the same
number of processes is exact all the same.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gptchat.config import TrainConfig
from gptchat.model.devices import multiplies_bfloat16
from gptchat.model.gpt2 import GPT2
from gptchat.training.muon import Muon

# Schedule: (progress after the warm-up, 0 to 1; the config, for parameters of its own) -> where the
# rate stands between its minimum (0) and its peak (1).
SCHEDULES: dict[str, Callable[[float, TrainConfig], float]] = {
    "cosine": lambda progress, config: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress, config: 1 - progress,
    "constant": lambda progress, config: 1.0,
}


def make_optimizers(model: GPT2, config: TrainConfig) -> list[Optimizer]:
    """AdamW for all parameters, or AdamW and Muon, which takes the matrices of the blocks.

    Each group keeps its peak rate as `peak_lr`; `set_learning_rate` scales it.
    """
    fused_matrices: list[Tensor] = []  # of queries, keys and values, for Muon
    muon_matrices: list[Tensor] = []  # the blocks' others, for Muon
    embeddings: list[Tensor] = []  # of tokens; the output head shares it
    matrices: list[Tensor] = []  # all others
    vectors: list[Tensor] = []  # biases and LayerNorms
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
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
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {
            "params": embeddings,
            "weight_decay": config.weight_decay,
            "lr": config.embedding_learning_rate or config.learning_rate,
        },
    ]
    betas = (config.beta1, config.beta2)
    optimizers: list[Optimizer] = [AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)]
    if muon_matrices:
        muon_groups = [{"params": fused_matrices, "parts": 3}, {"params": muon_matrices}]
        fast = torch.bfloat16 if multiplies_bfloat16(muon_matrices[0].device) else torch.float32
        muon = Muon(
            muon_groups,
            lr=config.muon_learning_rate,
            weight_decay=config.weight_decay,
            dtype=fast,
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class JointOptimizer(Optimizer):
    """Several optimizers that fp16's loss scaler sees as one.

    A gradient of any of them that is not finite then skips the step of all.
    """

    def __init__(self, optimizers: list[Optimizer]):
        groups = []
        for optimizer in optimizers:
            groups += [{"params": group["params"]} for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.optimizers = optimizers

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


def lr_scale(step: int, total_steps: int, config: TrainConfig) -> float:
    """The share of the peak learning rate in `step`, counted from 0.

    It grows linearly over the first `warmup_ratio` of all steps, then follows the schedule to
    `min_lr_ratio`.
    """
    warmup_steps = math.ceil(total_steps * config.warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    height = SCHEDULES[config.schedule](progress, config)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * height


def set_learning_rate(optimizers: list[Optimizer], scale: float) -> None:
    """Set every group's rate to `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def clip_gradients(model: torch.nn.Module, max_grad_norm: float) -> Tensor:
    """Scale the gradients down to norm `max_grad_norm`; 0 leaves them as they are.

    Returns the norm before, a scalar tensor.
    """
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)


def optimizer_state(model: GPT2, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Every state tensor, named `optimizer.<kind>.<parameter name>.<state key>`, for example
    `optimizer.adamw.h.0.ln_1.weight.exp_avg`. An optimizer that has not made a step yet has
    none."""
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for name, parameter in _named_parameters(model, optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{_kind(optimizer)}.{name}.{key}"] = value
    return tensors


def load_optimizer_state(
    model: GPT2, optimizers: list[Optimizer], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_state`, whatever the order of the parameters.

    Passes over names that do not begin with `optimizer.`; if none does, no step has been made yet,
    and there is nothing to load. Raises ValueError where a parameter lacks a state tensor that
    others of its optimizer have, or has one of another shape, and where an optimizer has none.
    """
    if not any(name.startswith("optimizer.") for name in tensors):
        return
    for optimizer in optimizers:
        prefix = f"optimizer.{_kind(optimizer)}."
        states = _states_by_parameter(tensors, prefix)
        if not states:
            raise ValueError(f"no {prefix}*")
        keys: set[str] = set().union(*states.values())
        numbered = {}  # the form that torch loads: a parameter is its number, through all groups
        for number, (name, parameter) in enumerate(_named_parameters(model, optimizer)):
            state = states.get(name, {})
            missing = keys - state.keys()
            if missing:
                raise ValueError(f"no {prefix}{name}.{min(missing)}")
            for key, value in state.items():
                if value.dim() > 0 and value.shape != parameter.shape:
                    raise ValueError(f"{prefix}{name}.{key} is {list(value.shape)}")
            numbered[number] = state
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _states_by_parameter(tensors: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """The tensors named `prefix` + parameter name + "." + state key: name -> key -> tensor."""
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        if full_name.startswith(prefix):
            name, _, key = full_name.removeprefix(prefix).rpartition(".")
            states.setdefault(name, {})[key] = value
    return states


def _kind(optimizer: Optimizer) -> str:
    """adamw or muon."""
    return type(optimizer).__name__.lower()


def _named_parameters(model: GPT2, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's parameters in its own order, with their names in the model."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[parameter], parameter
