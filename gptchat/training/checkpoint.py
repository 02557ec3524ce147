"""What a resumed run needs, in one file: weights, optimizer state, and how far the run has come.

`checkpoint.safetensors` in a run's folder is replaced atomically. It holds

- tensors: `model.<parameter name>`, and `optimizer.<kind>.<parameter name>.<state key>` with the
  kind adamw or muon
- metadata: `format`, the version of this layout; `state`, a `TrainState`; `config`, the resolved
  config; `digest`, of all tensors and the other metadata

It holds no data position and no random state: batches and dropout are functions of (seed, step,
micro-batch). On the same machine, with the same number of processes, precision and compilation, a
resumed run computes to the bit what an uninterrupted one does.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptchat.config import FREE_KEYS, Config, flatten
from gptchat.console import UserError
from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2
from gptchat.training.optim import Optimizers, load_optimizer_state, optimizer_state

# Raised whenever a run would go on otherwise than with the version that began it.
CHECKPOINT_FORMAT = "5"
# Keys of the resolved config that are digests of files.
DATA_KEYS = {"text.tokenizer", "text.train", "text.valid"}


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done
    best_loss: float = float("inf")  # of all evaluations, nats per target
    stale_evaluations: int = 0  # evaluations since the best one
    n_tokens: int = 0  # positions with a token, since the run began
    scaler: dict[str, Any] = field(default_factory=dict)  # the loss scale of fp16


@dataclass(frozen=True)
class Checkpoint:
    """The metadata of a checkpoint; `restore` reads its tensors."""

    path: Path
    state: TrainState
    config: dict[str, Any]


def path_in(folder: Path) -> Path:
    return folder / "checkpoint.safetensors"


def save(
    folder: Path, model: GPT2, optimizer: Optimizers, state: TrainState, config: dict[str, Any]
) -> None:
    """Write the checkpoint into the run's folder.

    Raises UserError if it cannot be written; the previous one then stays.
    """
    tensors = optimizer_state(model, optimizer)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":  # tied to wte.weight
            tensors[f"model.{name}"] = value
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {
        "format": CHECKPOINT_FORMAT,
        "state": json.dumps(asdict(state)),
        "config": json.dumps(config),
    }
    metadata["digest"] = digest(tensors, metadata)
    with atomic_write(path_in(folder)) as temporary:
        save_file(tensors, temporary, metadata)


def read(folder: Path) -> Checkpoint | None:
    """The metadata of a run's checkpoint, None without one.

    Raises UserError for a file that is no checkpoint or of another format.
    """
    path = path_in(folder)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        found = metadata.get("format", "unknown")
        if found != CHECKPOINT_FORMAT:
            raise UserError(
                f"{path}: found checkpoint format {found}; wanted {CHECKPOINT_FORMAT}; finish the "
                "run with the version of gptchat that began it, or remove the file to start anew"
            )
        state = TrainState(**json.loads(metadata["state"]))
        return Checkpoint(path, state, json.loads(metadata["config"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from None


def restore(path: Path, model: GPT2, optimizer: Optimizers) -> None:
    """Copy a checkpoint's tensors into model and optimizer.

    Raises UserError for a file that does not fit its digest.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata["digest"] != digest(tensors, metadata):
            raise ValueError("its digest is not that of its content")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name != "lm_head.weight":
                value.copy_(tensors[f"model.{name}"])
    load_optimizer_state(model, optimizer, tensors)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).replace("\n", " ")
    return UserError(f"{path}: not a whole checkpoint ({reason}); remove it to start the run anew")


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The BLAKE2b digest of a checkpoint: names, dtypes, shapes, bytes, and the other metadata.

    The tensors are contiguous and on the CPU. A thread hashes about 1 GB/s.
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


def resolve_config(config: Config, digests: dict[str, Any]) -> dict[str, Any]:
    """The config with a section `text` of digests, as it looks after a way through JSON."""
    return json.loads(json.dumps(asdict(config) | {"text": digests}))


def compare_configs(saved: Checkpoint, config: dict[str, Any]) -> list[str]:
    """What changed between a checkpoint's config and that of this start, in words.

    A key that the checkpoint lacks had its default. Raises UserError for a change of another key
    than FREE_KEYS.
    """
    now = flatten(config)
    before = flatten(resolve_config(Config(), {})) | flatten(saved.config)
    changes: dict[str, str] = {}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            changes[key] = f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
    refused = {key: change for key, change in changes.items() if key not in FREE_KEYS}
    if not refused:
        return list(changes.values())
    differences = "; ".join(refused.values())
    if refused.keys() <= DATA_KEYS:
        raise UserError(
            f"{saved.path}: the data is no longer what this run began with: {differences}; put it "
            f"back, or remove {config['run']} to train anew"
        )
    raise UserError(
        f"{saved.path}: made with another config: {differences}; change it back, or name another "
        f"run folder; only these keys may change: {', '.join(sorted(FREE_KEYS))}"
    )
