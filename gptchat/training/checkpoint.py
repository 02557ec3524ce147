"""What a resumed run needs, in one file: weights, optimizer state, and how far the run has come.

The file is a safetensors file that is replaced atomically: after a crash it is the previous
checkpoint or the new one.

- Tensors: `model.<parameter name>`, and `optimizer.<kind>.<parameter name>.<state key>` (kind:
  adamw or muon). State is found by name, so the order of parameters and groups may change between
  versions.
- Metadata: `format`, the version of this layout; `state`, a `TrainState`; `config`, the resolved
  config.

It holds no data position and no random state: batches and dropout are functions of (seed, step,
micro-batch). A run that goes on from here computes what it would have computed without a stop, to
the bit on the same machine with the same number of processes, precision and compilation. A file of
another format, an incomplete one, or one whose config differs in more than FREE_KEYS is refused
with one line. `lock` keeps a second run out of the run's folder.
"""

import fcntl
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim import Optimizer

from gptchat.console import UserError
from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2
from gptchat.training.optim import load_optimizer_state, optimizer_state

# 1, which had no number: optimizer state by the parameters' numbers. 2: by their names.
FORMAT = "2"

# Keys that may change between two starts of a run: what the checkpoint holds means the same under
# any value.
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

    step: int = 0  # optimizer steps done
    best_loss: float = float("inf")  # of all evaluations, nats per target
    stale_evaluations: int = 0  # evaluations since the best one
    loss_sum: float = 0.0  # over the targets since the last line of the log, of all processes
    n_targets: int = 0  # their number
    log_bytes: int = 0  # length of the loss log
    scaler: dict[str, Any] = field(default_factory=dict)  # the loss scale of fp16


def save_checkpoint(
    path: Path,
    model: GPT2,
    optimizers: list[Optimizer],
    state: TrainState,
    config: dict[str, Any],
) -> None:
    """Write the checkpoint.

    Raises UserError where it cannot be written; the previous one then stays.
    """
    tensors = optimizer_state(model, optimizers)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":  # tied to wte.weight
            tensors[f"model.{name}"] = value
    metadata = {
        "format": FORMAT,
        "state": json.dumps(asdict(state)),
        "config": json.dumps(config),
    }
    with atomic_write(path) as temporary:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, temporary, metadata)


def load_checkpoint(
    path: Path, model: GPT2, optimizers: list[Optimizer], config: dict[str, Any]
) -> TrainState:
    """Restore model and optimizers in place.

    Raises UserError for a damaged file, one of another format, or one whose config differs in other
    than `FREE_KEYS`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _refuse_other_format(path, metadata.get("format"))
            _refuse_other_config(path, json.loads(metadata["config"]), config)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        load_optimizer_state(model, optimizers, tensors)
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
    return TrainState(**json.loads(metadata["state"]))


def _refuse_other_format(path: Path, found: str | None) -> None:
    if found != FORMAT:
        raise UserError(
            f"{path}: found checkpoint format {found or 'unknown'}; wanted {FORMAT}; finish "
            "the run with the version of gptchat that began it, or remove the file to start anew"
        )


def _refuse_other_config(path: Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    before = flatten(saved)
    now = flatten(config)
    changes = []
    for key in sorted(before.keys() | now.keys()):
        if key not in FREE_KEYS and before.get(key) != now.get(key):
            changes.append(f"{key} was {before.get(key)!r}, is {now.get(key)!r}")
    if changes:
        raise UserError(
            f"{path}: made with another config: {'; '.join(changes)}; "
            "change it back, or name another run folder"
        )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables -> {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def lock(folder: Path) -> IO[str]:
    """Hold `folder` for this process until it ends, or until the returned file is closed.

    Raises UserError while another process holds it.
    """
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
