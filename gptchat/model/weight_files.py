"""The weights of a model directory: found, compared with the config, read, and checked.

Weights are in `model.safetensors` or `pytorch_model.bin`, in one file or several with an index.
Nothing in a directory is trusted. Only regular files that stand in it are opened (a link to a file
is one, as in Hugging Face's cache). `check_shapes` compares names and shapes, which are known
before any weight is read, with those that the config asks for, so that a config alone cannot make
us take memory or time. `copy_weights` refuses NaN and infinity.

Files that `save_weights` writes carry a digest of their tensors in their metadata, which is
verified when they are read. (BLAKE2b: 0.5 s for the 0.5 GB of GPT-2 124M.)
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptchat.console import UserError
from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.model.loss import at_least_float32

PREFIX = "transformer."
OLD_CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # stored by older transformers
HEAD = "lm_head.weight"
DIGEST = "gptchat_blake2b"  # the key of the metadata
MAX_JSON = 1 << 22  # bytes of a config or an index
MAX_HEADER = 1 << 22  # bytes of a safetensors file's table of tensors
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # by safetensors' names


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # one of FLOATS, or a name
    read: Callable[[], Tensor]

    @property
    def name(self) -> str:
        """What our model calls it."""
        return self.stored_name.removeprefix(PREFIX)


@dataclass(frozen=True)
class WeightFile:
    """An open file of weights. `digest` is what its metadata say of its tensors, if they do."""

    path: Path
    tensors: list[StoredTensor]
    digest: str | None = None


# --- finding and opening


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises UserError for anything else, and for a key that stands twice in an object.
    """
    directory = path.parent
    if not path.is_file():
        if not directory.is_dir():
            problem = "no such directory"
        elif path.exists():
            problem = f"{path.name} is no regular file"
        else:
            problem = f"found no {path.name}"
        raise UserError(f"{directory}: {problem}; wanted a model directory in Hugging Face layout")
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"longer than {limit:,} bytes")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_object_without_duplicates)
        return {**value}
    except RecursionError:
        raise UserError(f"{path}: cannot be read as a JSON object: nested too deeply") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object: {error}") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"{key!r:.80} stands there twice")
        value[key] = item
    return value


def open_weights(directory: Path) -> list[WeightFile]:
    """All files that hold the weights, open; nothing but their tables of tensors has been read.

    (Older .bin files cannot be read in part.) Raises UserError for a file that is not whole.
    """
    opened = []
    for path in _weight_paths(directory):
        try:
            if path.suffix == ".safetensors":
                opened.append(_open_safetensors(path))
            else:
                opened.append(WeightFile(path, _open_bin(path)))
        except Exception as error:  # both libraries raise almost anything for a broken file
            raise _unreadable(path, error) from None
    return opened


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path}: not a whole file of weights: {reason:.200}")


def _weight_paths(directory: Path) -> list[Path]:
    """The files that hold the weights; like transformers, it prefers safetensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.exists():
            return _paths_in_index(index, Path(name).suffix)
    raise UserError(
        f"{directory}: found no weights; "
        "wanted model.safetensors or pytorch_model.bin, or an index of it"
    )


def _paths_in_index(index: Path, suffix: str) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is no table; wanted tensor names with their files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != suffix:
            raise UserError(
                f"{index}: names the file {name!r:.80}; wanted names that end in {suffix}, "
                "without a folder"
            )
        if not index.with_name(name).is_file():
            raise UserError(f"{index}: names {name!r:.80}, which is no file beside it")
    return [index.with_name(name) for name in sorted(set(weight_map.values()))]


def _open_safetensors(path: Path) -> WeightFile:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER:
        raise ValueError(f"its table of tensors would have {header:,} bytes")
    opened = safe_open(path, framework="pt")
    tensors = []
    for name in sorted(opened.keys()):
        table_entry = opened.get_slice(name)
        shape = tuple(table_entry.get_shape())
        code = table_entry.get_dtype()
        tensors.append(
            StoredTensor(path, name, shape, FLOATS.get(code, code), _reader(opened, name))
        )
    return WeightFile(path, tensors, (opened.metadata() or {}).get(DIGEST))


def _reader(opened: Any, name: str) -> Callable[[], Tensor]:
    return lambda: opened.get_tensor(name)


def _open_bin(path: Path) -> list[StoredTensor]:
    is_zip = zipfile.is_zipfile(path)  # torch.load cannot map the format before torch 1.6
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError("compressed, which torch.save never does")
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(loaded, dict):
        raise ValueError("no dictionary of tensors")
    tensors = []
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError("no dictionary of tensors")
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{name:.80} is larger than what is stored of it")
        tensors.append(StoredTensor(path, name, tuple(value.shape), value.dtype, value.detach))
    return tensors


# --- comparing with the config


def conv1d_layout(name: str, tensor: Tensor) -> Tensor:
    """A parameter (or its gradient) of ours in transformers' layout, or the other way round.

    The weights of its Conv1D layers, which have names like `attn.c_proj.weight`, are transposed.
    """
    return tensor.T if ".c_" in name and name.endswith(".weight") else tensor


def wanted_shapes(config: GPT2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of GPT2LMHeadModel's tensors, without prefix and head, in its layout."""
    width = config.n_embd
    inner = config.n_inner or 4 * width
    yield "wte.weight", (config.vocab_size, width)
    yield "wpe.weight", (config.n_positions, width)
    for layer in range(config.n_layer):
        for norm in ("ln_1", "ln_2"):
            yield f"h.{layer}.{norm}.weight", (width,)
            yield f"h.{layer}.{norm}.bias", (width,)
        linears = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }
        for linear, shape in linears.items():
            yield f"h.{layer}.{linear}.weight", shape
            yield f"h.{layer}.{linear}.bias", shape[1:]
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def check_shapes(directory: Path, config: GPT2Config, files: Iterable[WeightFile]) -> None:
    """Raise UserError unless the files hold each tensor of the config once, and no other.

    Takes time and memory for the tensors that are there, however many the config asks for.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name.endswith(OLD_CAUSAL_MASKS):
                continue
            if tensor.name in found:
                raise _unexpected(tensor)
            found[tensor.name] = tensor
    head = found.pop(HEAD, None)
    for name, shape in wanted_shapes(config):
        if name not in found:
            raise UserError(
                f"{directory}: the weights lack {name}; wanted all tensors of the "
                f"{config.n_layer} layers in config.json"
            )
        _check_tensor(found.pop(name), shape)
    for tensor in found.values():
        raise _unexpected(tensor)
    if head is not None:
        _check_tensor(head, (config.vocab_size, config.n_embd))


def _unexpected(tensor: StoredTensor) -> UserError:
    return UserError(
        f"{tensor.file}: found the tensor {tensor.stored_name!r:.80}; "
        "wanted those of GPT2LMHeadModel and config.json alone, each once"
    )


def _check_tensor(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in FLOATS.values():
        found = f"{[*tensor.shape]}"
        raise UserError(
            f"{tensor.file}: {tensor.stored_name} is {tensor.dtype} {found:.80}; "
            f"wanted floats {[*shape]}, as in config.json"
        )


# --- reading and writing


@torch.no_grad()
def copy_weights(model: GPT2, directory: Path, files: Iterable[WeightFile], tied: bool) -> None:
    """Copy the files' tensors into the parameters, one by one: no file is in memory as a whole.

    `check_shapes` has seen the files. Raises UserError for a number that is not finite, for bytes
    that have changed since they were saved, and for a head of its own.
    """
    parameters = dict(model.named_parameters())
    head: Tensor | None = None
    head_path = directory
    for file in files:
        digest = blake2b(digest_size=16)
        for stored in file.tensors:
            tensor = _read(stored)
            if file.digest is not None:
                _add_to_digest(digest, stored.stored_name, tensor)
            if stored.name == HEAD:
                head, head_path = tensor, file.path
            elif stored.name in parameters:
                parameter = parameters[stored.name]
                conv1d_layout(stored.name, parameter).copy_(tensor)
                _check_finite(stored, parameter)
        if file.digest is not None and file.digest != digest.hexdigest():
            raise UserError(
                f"{file.path}: damaged: its weights are not those that were saved; "
                "wanted the file as it was written"
            )
    if head is None and not tied:
        raise UserError(f"{directory}: the weights lack {HEAD}; wanted all of them")
    if head is not None and not torch.equal(head.to(model.wte.weight), model.wte.weight):
        raise UserError(
            f"{head_path}: {HEAD} differs from wte.weight; wanted a head tied to the embedding"
        )


def _read(stored: StoredTensor) -> Tensor:
    try:
        return stored.read()
    except Exception as error:  # the library raises almost anything for a broken file
        raise _unreadable(stored.file, error) from None


def _check_finite(stored: StoredTensor, values: Tensor) -> None:
    """Raise UserError for NaN or infinity among the values.

    A sum takes a tenth of the time of looking at each. One that is not finite may be an overflow.
    """
    total = values.sum(dtype=at_least_float32(values.dtype))
    if not total.isfinite() and not values.isfinite().all():
        raise UserError(
            f"{stored.file}: {stored.stored_name} holds NaN or infinity; wanted finite numbers"
        )


def _add_to_digest(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
    digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
