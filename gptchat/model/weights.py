"""The weights of a model directory, read into a model and written.

They are in `model.safetensors` or `pytorch_model.bin`, in one file or several with an index, with
or without the `transformer.` prefix. transformers' linear layers are Conv1D, whose weights are
(in, out): they are transposed on the way in and out.

`load_weights` compares all names and shapes with the model's before it takes memory for any of
them, and refuses NaN and infinity. Files that `save_weights` writes carry a digest of their
tensors, which is verified when they are read (0.5 s for the 0.5 GB of GPT-2 124M).
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptchat.console import UserError
from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2

PREFIX = "transformer."
OLD_CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # stored by older transformers
HEAD = "lm_head.weight"
DIGEST = "gptchat_blake2b"  # the key of the metadata
GIT_LFS = b"version https://git-lfs"  # how a pointer begins
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SAFETENSORS_DTYPES = dict(zip(("F64", "F32", "F16", "BF16"), FLOATS, strict=True))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet. `dtype` is one of FLOATS, or the name of another."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class WeightFile:
    """An open file of weights: its tensors by the names in it, and the digest in its metadata."""

    path: Path
    tensors: dict[str, StoredTensor]
    digest: str | None = None


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


def load_weights(
    model: GPT2, directory: Path, device: torch.device | str, dtype: torch.dtype, tied: bool
) -> None:
    """Fill a model that is on "meta" with the weights of a directory, one tensor at a time.

    Raises UserError for a file that is not whole, for tensors that are not the model's, and for an
    output head that is not the embedding; `tied` says that a file without a head means that.
    """
    files = [_open(path) for path in _weight_paths(directory)]
    wanted = {name: conv1d_layout(name, value) for name, value in model.named_parameters()}
    _check_shapes(directory, files, wanted)
    state: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read_tensors(file):
            if name not in wanted and name != HEAD:
                continue
            try:
                own = conv1d_layout(name, tensor).to(
                    device, dtype, copy=True, memory_format=torch.contiguous_format
                )
            except RuntimeError as error:
                raise UserError(
                    f"{directory}: no memory for the model on {device}: {_first_line(error)}"
                ) from None
            if not own.sum(dtype=torch.float64).isfinite():
                raise UserError(f"{file.path}: {name} holds NaN or infinity; wanted finite numbers")
            state[name] = own
    head = state.pop(HEAD, None)
    if head is None and not tied:
        raise UserError(f"{directory}: the weights lack {HEAD}; wanted all of them")
    if head is not None and not torch.equal(head, state["wte.weight"]):
        raise UserError(
            f"{directory}: {HEAD} differs from wte.weight; wanted a head tied to the embedding"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.lm_head.weight = model.wte.weight
    model.type_rows = torch.tensor(model.config.type_rows, device=device)


def _weight_paths(directory: Path) -> list[Path]:
    """The files that hold the weights; like transformers, it prefers safetensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            parts = list(weight_map.values()) if isinstance(weight_map, dict) else []
            paths = [directory / part for part in dict.fromkeys(map(str, parts))]
            for path in paths:
                if path.parent != directory or not path.is_file():
                    raise UserError(f"{index}: names {path.name:.80}, which is no file beside it")
            return paths
    raise UserError(
        f"{directory}: found no weights; "
        "wanted model.safetensors or pytorch_model.bin, or an index of it"
    )


def _open(path: Path) -> WeightFile:
    """A file whose table of tensors has been read. (Older .bin files cannot be read in part.)"""
    try:
        with path.open("rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise ValueError("it is a pointer of Git LFS; `git lfs pull` fetches the weights")
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)
    except Exception as error:  # both libraries raise almost anything for a broken file
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a whole file of weights: {_first_line(error):.200}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _open_safetensors(path: Path) -> WeightFile:
    file = safe_open(path, framework="pt")
    tensors = {}
    for name in sorted(file.keys()):
        entry = file.get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(entry.get_dtype(), entry.get_dtype())
        read = partial(file.get_tensor, name)
        tensors[name] = StoredTensor(tuple(entry.get_shape()), dtype, read)
    return WeightFile(path, tensors, (file.metadata() or {}).get(DIGEST))


def _open_bin(path: Path) -> WeightFile:
    can_map = zipfile.is_zipfile(path)  # not the format before torch 1.6
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    tensors = {}
    for name, value in dict(loaded).items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError("no dictionary of tensors")
        tensors[name] = StoredTensor(tuple(value.shape), value.dtype, value.detach)
    return WeightFile(path, tensors)


def _check_shapes(directory: Path, files: list[WeightFile], wanted: dict[str, Tensor]) -> None:
    """Raise UserError unless the files hold each wanted tensor once, and no other but a head."""
    found = set()
    for file in files:
        for stored_name, tensor in file.tensors.items():
            name = stored_name.removeprefix(PREFIX)
            if name.endswith(OLD_CAUSAL_MASKS):
                continue
            if name in found or (name not in wanted and name != HEAD):
                raise UserError(
                    f"{file.path}: found the tensor {stored_name!r:.80}; wanted only those of "
                    "GPT2LMHeadModel and config.json, each once"
                )
            found.add(name)
            shape = tuple(wanted["wte.weight" if name == HEAD else name].shape)
            if tensor.shape != shape or tensor.dtype not in FLOATS:
                raise UserError(
                    f"{file.path}: {stored_name} is {tensor.dtype} {[*tensor.shape]!s:.80}; "
                    f"wanted floats {[*shape]}, as in config.json"
                )
    for name in wanted:
        if name not in found:
            raise UserError(f"{directory}: the weights lack {name}, which config.json asks for")


def _read_tensors(file: WeightFile) -> Iterator[tuple[str, Tensor]]:
    """Yields our name and the tensor for each in the file, and verifies the digest at the end."""
    digest = blake2b(digest_size=16)
    for stored_name, stored in file.tensors.items():
        try:
            tensor = stored.read()
        except Exception as error:  # as in `_open`
            raise _unreadable(file.path, error) from None
        if file.digest is not None:
            _add_to_digest(digest, stored_name, tensor)
        yield stored_name.removeprefix(PREFIX), tensor
    if file.digest is not None and file.digest != digest.hexdigest():
        raise UserError(
            f"{file.path}: damaged: its weights are not those that were saved; "
            "wanted the file as it was written"
        )


def _add_to_digest(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def conv1d_layout(name: str, tensor: Tensor) -> Tensor:
    """A parameter (or its gradient) of ours in transformers' layout, or the other way round.

    The weights of its Conv1D layers, which have names like `attn.c_proj.weight`, are transposed.
    """
    return tensor.T if ".c_" in name and name.endswith(".weight") else tensor


def hugging_face_state(model: GPT2) -> dict[str, Tensor]:
    """The weights by GPT2LMHeadModel's names and in its layout, as views of ours.

    The head, which shares the token embedding's weights, is not listed again.
    """
    return {
        PREFIX + name: conv1d_layout(name, parameter.detach())
        for name, parameter in model.named_parameters()
    }


def save_weights(directory: str | Path, model: GPT2) -> None:
    """Replace `model.safetensors`, in the model's dtype, with a digest of the tensors.

    Raises UserError where it cannot be written; the old file then stays.
    """
    state = hugging_face_state(model)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    digest = blake2b(digest_size=16)
    for name in sorted(contiguous):
        _add_to_digest(digest, name, contiguous[name])
    metadata = {"format": "pt", DIGEST: digest.hexdigest()}
    with atomic_write(Path(directory, "model.safetensors")) as temporary:
        save_file(contiguous, temporary, metadata=metadata)
