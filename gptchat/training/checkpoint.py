"""What a resumed run needs, in one file that is atomic_write atomically: weights, optimizer state, and in the metadata the
step, the best loss so far and the config. Batches and dropout are functions of the step, so there is nothing else."""

import fcntl
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim import Optimizer

from gptchat.console import UserError
from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2
from gptchat.training.optim import load_optimizer_state, optimizer_state

# Changing these between two starts of a run leaves what the checkpoint holds as meaningful as it was.
FREE_KEYS = {
    "train.num_epochs",
    "train.num_steps",
    "train.eval_interval",
    "train.log_interval",
    "train.patience",
    "train.precision",
    "train.compile",
    "train.activation_checkpointing",
    "train.device",
    "data.test",
    "data.shards",
    "run",
}


@dataclass
class TrainState:
    """How far a run has come."""

    step: int = 0
    best_loss: float = float("inf")
    stale_evaluations: int = 0  # evaluations since the best one
    loss_sum: float = 0.0  # over the targets since the last log line
    n_targets: int = 0
    log_bytes: int = 0  # length of the loss log
    scaler: dict[str, Any] = field(default_factory=dict)  # the fp16 loss scale


def save_checkpoint(
    path: Path,
    model: GPT2,
    optimizers: list[Optimizer],
    progressed: TrainState,
    config: dict[str, Any],
) -> None:
    """Write the checkpoint. Raises UserError where it cannot be written; the previous one then stays."""
    tensors = {
        f"model.{name}": value
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    tensors |= optimizer_state(optimizers)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(
            tensors,
            temporary,
            {"progressed": json.dumps(vars(progressed)), "config": json.dumps(config)},
        )


def load_checkpoint(
    path: Path, model: GPT2, optimizers: list[Optimizer], config: dict[str, Any]
) -> TrainState:
    """Restore model and optimizers in place. Raises UserError for a damaged file or a config that does not fit it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            _refuse_other_config(path, json.loads(metadata["config"]), config)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: not a whole checkpoint ({error}); remove it to start the run anew"
        ) from None
    weights = {
        name.removeprefix("model."): value
        for name, value in tensors.items()
        if name.startswith("model.")
    }
    model.load_state_dict(weights | {"lm_head.weight": weights["wte.weight"]})
    load_optimizer_state(optimizers, tensors)
    return TrainState(**json.loads(metadata["progressed"]))


def _refuse_other_config(path: Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    before, now = flatten(saved), flatten(config)
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if key not in FREE_KEYS and before.get(key) != now.get(key)
    ]
    if changed:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise UserError(
            f"{path}: made with another config: {told}; change it back, or name another run folder"
        )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables -> {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def lock(folder: Path) -> IO[str]:
    """Hold `folder` for this process until it ends, however it ends. Raises UserError while another one holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another run is training here; wait for it, or name another run folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; wanted a folder for the run that can be written"
        ) from None
    return file
