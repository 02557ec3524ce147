"""The weights of a model directory, read into a model and written.

They are in `model.safetensors` or `pytorch_model.bin`, in one file or several with an index, with
or without the prefix `transformer.`. transformers' linear layers are Conv1D, whose weights are
(in, out). Ours are (out, in), so these are transposed on the way in and out.

All names and shapes are compared with the model's before memory is taken for any of them. NaN and
infinity are refused. Files that `save_weights` writes carry a digest of their tensors, which every
load verifies (0.5 s for the 0.5 GB of GPT-2 124M).
"""

import json
import zipfile
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptchat.console import UserError, first_line
from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2

PREFIX = "transformer."
OLD_CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # stored by older transformers
HEAD = "lm_head.weight"
DIGEST = "gptchat_blake2b"  # the key of the metadata
GIT_LFS = b"version https://git-lfs"  # how a pointer begins
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (FileNotFoundError, NotADirectoryError):
        problem = f"found no {path.name}" if path.parent.is_dir() else "no such directory"
        raise UserError(
            f"{path.parent}: {problem}; wanted a model directory in Hugging Face layout"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object: {error}") from None


@torch.no_grad()
def load_weights(
    model: GPT2, directory: Path, device: torch.device | str, dtype: torch.dtype, tied: bool
) -> None:
    """Fill a model that is on "meta" with the weights of a directory.

    `tied` says that files without an output head mean the embedding. Raises UserError for a broken
    file, for other tensors than the model's, and for a head that differs from the embedding.
    """
    stored = _stored_tensors(model, directory)
    head = stored.pop(HEAD, None)
    if head is None and not tied:
        raise UserError(f"{directory}: the weights lack {HEAD}; wanted all of them")
    wte = stored["wte.weight"]
    if head is not None and not torch.equal(head.to(wte.dtype), wte):
        raise UserError(
            f"{directory}: {HEAD} differs from wte.weight; wanted a head tied to the embedding"
        )
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        try:
            own = conv1d_layout(name, tensor).to(
                device, dtype, copy=True, memory_format=torch.contiguous_format
            )
        except RuntimeError as error:
            raise UserError(
                f"{directory}: no memory for the model on {device}: {first_line(error)}"
            ) from None
        if not own.sum(dtype=torch.float64).isfinite():
            raise UserError(f"{directory}: {name} holds NaN or infinity; wanted finite numbers")
        state[name] = own
    model.load_state_dict(state, strict=False, assign=True)
    model.lm_head.weight = model.wte.weight
    model.type_rows = torch.tensor(model.config.type_rows, device=device)


def _stored_tensors(model: GPT2, directory: Path) -> dict[str, Tensor]:
    """The model's tensors, and a head if there is one, by our names, mapped from the files."""
    shapes = {name: [*conv1d_layout(name, value).shape] for name, value in model.named_parameters()}
    allowed = shapes | {HEAD: shapes["wte.weight"]}
    stored: dict[str, Tensor] = {}
    for path in _weight_paths(directory):
        for stored_name, tensor in _map_file(path).items():
            name = stored_name.removeprefix(PREFIX)
            if name.endswith(OLD_CAUSAL_MASKS):
                continue
            if name in stored or name not in allowed:
                raise UserError(
                    f"{path}: found the tensor {stored_name!r:.80}; wanted only those of "
                    "GPT2LMHeadModel and config.json, each once"
                )
            shape = [*tensor.shape]
            if shape != allowed[name] or tensor.dtype not in FLOATS:
                raise UserError(
                    f"{path}: {stored_name} is {tensor.dtype} {shape!s:.80}; "
                    f"wanted floats {allowed[name]}, as in config.json"
                )
            stored[name] = tensor
    for name in shapes:
        if name not in stored:
            raise UserError(f"{directory}: the weights lack {name}, which config.json asks for")
    return stored


def _weight_paths(directory: Path) -> list[Path]:
    """The files that hold the weights; like transformers, it prefers safetensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            parts = weight_map.values() if isinstance(weight_map, dict) else ()
            paths = [directory / part for part in dict.fromkeys(map(str, parts))]
            for path in paths:
                if path.parent != directory or not path.is_file():
                    raise UserError(f"{index}: names {path.name:.80}, which is no file beside it")
            return paths
    raise UserError(
        f"{directory}: found no weights; "
        "wanted model.safetensors or pytorch_model.bin, or an index of it"
    )


def _map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by the names in it. They are mapped into memory, unless a .bin is from
    before torch 1.6. Raises UserError for a file that is broken, or damaged by its digest.
    """
    digest = None
    try:
        with path.open("rb") as start:
            if start.read(len(GIT_LFS)) == GIT_LFS:
                raise ValueError("it is a pointer of Git LFS; `git lfs pull` fetches the weights")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                digest = (file.metadata() or {}).get(DIGEST)
        else:
            can_map = zipfile.is_zipfile(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
            tensors = {str(name): value for name, value in dict(loaded).items()}
            if not all(isinstance(value, Tensor) for value in tensors.values()):
                raise ValueError("no dictionary of tensors")
    except Exception as error:  # both libraries raise almost anything for a broken file
        reason = first_line(error)
        raise UserError(f"{path}: not a whole file of weights: {reason:.200}") from None
    if digest is not None and digest != _digest(tensors):
        raise UserError(
            f"{path}: damaged: its weights are not those that were saved; "
            "wanted the file as it was written"
        )
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, dtypes, shapes and numbers."""
    digest = blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def conv1d_layout(name: str, tensor: Tensor) -> Tensor:
    """A parameter of ours (or its gradient) in transformers' layout, or the other way round.

    The weights of its Conv1D layers, which have names like `attn.c_proj.weight`, are transposed.
    """
    return tensor.T if ".c_" in name and name.endswith(".weight") else tensor


def hugging_face_state(model: GPT2) -> dict[str, Tensor]:
    """Views of the weights by GPT2LMHeadModel's names and in its layout, without the tied head."""
    return {
        PREFIX + name: conv1d_layout(name, parameter.detach())
        for name, parameter in model.named_parameters()
    }


def save_weights(directory: str | Path, model: GPT2) -> None:
    """Replace `model.safetensors`; if it cannot be written the old one stays."""
    state = hugging_face_state(model)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", DIGEST: _digest(contiguous)}
    with atomic_write(Path(directory, "model.safetensors")) as temporary:
        save_file(contiguous, temporary, metadata=metadata)
