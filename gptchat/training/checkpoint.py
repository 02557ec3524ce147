"""What a resumed run needs, in one file: weights, optimizer state, and how far the run has come.

The file is a safetensors file that is replaced atomically: after a crash it is the previous
checkpoint or the new one.

- Tensors: `model.<parameter name>`, and `optimizer.<kind>.<parameter name>.<state key>` (kind:
  adamw or muon). State is found by name, so the order of parameters and groups may change between
  versions.
- Metadata: `format`, the version of this layout; `state`, a `TrainState`; `config`, the resolved
  config; `digest`, of all tensors and of the other metadata.

It holds no data position and no random state: batches and dropout are functions of (seed, step,
micro-batch). A run that goes on from here computes what it would have computed without a stop, to
the bit on the same machine with the same number of processes, precision and compilation. A file of
another format, one of which a bit has changed, one whose tensors are not those of the run's model
and optimizers, or one whose config differs in more than FREE_KEYS is refused with one line. `lock`
keeps a second run out of the run's folder.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from gptchat.console import UserError
from gptchat.files import atomic_write, lock_folder
from gptchat.model.gpt2 import GPT2
from gptchat.training.optim import load_optimizer_state, optimizer_state
from gptchat.training.saved_config import compare_configs

# 1, which had no number: optimizer state by the parameters' numbers. 2: by their names. 3: with a
# digest. 4: Muon takes queries, keys and values apart, so that a run of 3 would go on otherwise.
CHECKPOINT_FORMAT = "4"


@dataclass
class TrainState:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    best_loss: float = float("inf")  # of all evaluations, nats per target
    stale_evaluations: int = 0  # evaluations since the best one
    loss_sum: float = 0.0  # over the targets since the last line of the log, of all processes
    n_targets: int = 0  # their number
    n_tokens: int = 0  # positions with a token, since the run began
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
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in run_tensors(model, optimizers).items()
    }
    metadata = {
        "format": CHECKPOINT_FORMAT,
        "state": json.dumps(asdict(state)),
        "config": json.dumps(config),
    }
    metadata["digest"] = digest(tensors, metadata)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)


def run_tensors(model: GPT2, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: weights and optimizer state."""
    tensors = optimizer_state(model, optimizers)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":  # tied to wte.weight
            tensors[f"model.{name}"] = value
    return tensors


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The BLAKE2b digest of a checkpoint: names, dtypes, shapes, bytes, and the other metadata.

    The tensors are contiguous and on the CPU. One thread hashes about 1 GB/s; several tensors are
    hashed at once.
    """
    names = sorted(tensors)
    with ThreadPoolExecutor() as pool:
        tensor_digests = pool.map(_tensor_digest, [tensors[name] for name in names])
    parts: list[list[str]] = [[key, metadata[key]] for key in ("format", "state", "config")]
    for name, tensor_digest in zip(names, tensor_digests, strict=True):
        value = tensors[name]
        parts.append([name, str(value.dtype), str(list(value.shape)), tensor_digest])
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).hexdigest()


def _tensor_digest(value: Tensor) -> str:
    content: Any = value.reshape(-1).view(torch.uint8).numpy()  # no copy
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def load_checkpoint(
    path: Path, model: GPT2, optimizers: list[Optimizer], config: dict[str, Any]
) -> tuple[TrainState, list[str]]:
    """Restore model and optimizers in place.

    Returns how far the run has come, and what has changed in its config since, in words. Raises
    UserError for a damaged file, one of another format, one of other tensors, or one whose config
    differs in other than `FREE_KEYS`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _refuse_other_format(path, metadata.get("format"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata["digest"] != digest(tensors, metadata):
            raise ValueError("its digest is not that of its content")
        changes = compare_configs(path, json.loads(metadata["config"]), config)
        state = TrainState(**json.loads(metadata["state"]))
        has_state = any(name.startswith("optimizer.") for name in tensors)
        if state.step > 0 and not state.scaler and not has_state:  # fp16 may skip every step
            raise ValueError("no optimizer state")
        _restore(model, optimizers, tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        reason = str(error).replace("\n", " ")
        raise UserError(
            f"{path}: not a whole checkpoint ({reason}); remove it to start the run anew"
        ) from None
    return state, changes


def _restore(model: GPT2, optimizers: list[Optimizer], tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into model and optimizers.

    Raises ValueError for a tensor that is missing, superfluous or of another shape or dtype.
    """
    weights = run_tensors(model, [])
    stored_weights = {name: value for name, value in tensors.items() if name in weights}
    _compare_tensors(stored_weights, weights)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(stored_weights[name])
    load_optimizer_state(model, optimizers, tensors)
    _compare_tensors(tensors, run_tensors(model, optimizers))


def _compare_tensors(stored: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise ValueError where names, shapes or dtypes differ."""
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in stored:
            raise ValueError(f"no {name}")
        if name not in wanted:
            raise ValueError(f"found {name}, which the run does not have")
        found = _describe(stored[name])
        if found != _describe(wanted[name]):
            raise ValueError(f"{name} is {found}, wanted {_describe(wanted[name])}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _refuse_other_format(path: Path, found: str | None) -> None:
    if found != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: found checkpoint format {found or 'unknown'}; wanted {CHECKPOINT_FORMAT}; "
            "finish the run with the version of gptchat that began it, "
            "or remove the file to start anew"
        )


def lock(folder: Path) -> IO[str]:
    """Hold a run's folder for this process until it ends, or until the returned file is closed.

    Raises UserError while another process holds it.
    """
    return lock_folder(folder, "another run is training here")
