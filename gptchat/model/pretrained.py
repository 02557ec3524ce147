"""Model directories in Hugging Face layout, read and written; and `gptchat convert`.

Reads directories written here and anyone's GPT-2: weights in `model.safetensors` or
`pytorch_model.bin`, in one file or several, with or without the `transformer.` prefix. What our
model cannot compute exactly is refused. Writes what transformers' GPT2LMHeadModel.from_pretrained
and AutoTokenizer read. Its linear layers are Conv1D, whose weights are (in, out): they are
transposed on the way in and out.

A foreign vocabulary lacks our special tokens, and a foreign model the rows of its token types.
`adapt` appends both. `gptchat convert` does so to a whole directory.
"""

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gptchat.console import CommandParser, UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.files import atomic_write
from gptchat.model.gpt2 import ACTIVATIONS, GPT2, GPT2Config

PREFIX = "transformer."
OLD_CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # stored by older transformers
UNREADABLE = (
    SafetensorError,
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    pickle.UnpicklingError,
)
NO_TYPE_ROWS = (-1, -1)  # of a foreign model before `adapt`
# What these keys of config.json may be; the first value is the default. The other keys that are
# not in GPT2Config are about training and generation, or, like `reorder_and_upcast_attn`, about
# rounding.
SUPPORTED = {
    "model_type": ("gpt2",),
    "architectures": (["GPT2LMHeadModel"], ["GPT2Model"], None),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "activation_function": tuple(ACTIVATIONS),
}


def load_model(
    directory: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    dropout: float | None = None,
) -> tuple[GPT2, Tokenizer, str]:
    """The model (in evaluation mode), its tokenizer, and its task, "lm" or "chatlm".

    `dropout` replaces the three rates of config.json; None keeps them. A foreign model is an "lm"
    and has no type rows until `adapt`. Raises UserError for a directory that is damaged or
    incomplete, or whose model this one cannot represent.
    """
    directory = Path(directory)
    path = directory / "config.json"
    values = _read_json(path, directory)
    config = _model_config(path, values)
    if dropout is not None:
        config = dataclasses.replace(
            config, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout
        )
    tokenizer = Tokenizer.load(directory)
    beyond_model = tokenizer.token_bytes[config.vocab_size :]
    if any(beyond_model):  # special tokens, which have no bytes, may get their rows later
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} entries; "
            f"wanted {config.vocab_size}"
        )
    with torch.device("meta"):
        model = GPT2(config)
    model = model.to(dtype).to_empty(device=device)
    model.lm_head.weight = model.wte.weight
    model.type_rows = torch.tensor(config.type_rows, device=device)
    _load_weights(model, directory, tied=values.get("tie_word_embeddings", True))
    task = values.get("gptchat", {}).get("task", "lm")
    return model.eval(), tokenizer, task


# --- config.json


def _read_json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        problem = f"found no {path.name}" if directory.is_dir() else "no such directory"
        raise UserError(f"{directory}: {problem}; wanted a model directory in Hugging Face layout")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return {**value}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object: {error}") from None


def _model_config(path: Path, values: dict[str, Any]) -> GPT2Config:
    for key, supported in SUPPORTED.items():
        value = values.get(key, supported[0])
        if value not in supported:
            raise UserError(
                f"{path}: {key} is {value!r}; wanted {' or '.join(map(str, supported))}"
            )
    arguments = {
        field.name: _config_value(path, field, values)
        for field in dataclasses.fields(GPT2Config)
        if field.name != "type_rows"
    }
    if arguments["n_embd"] % arguments["n_head"]:
        raise UserError(
            f"{path}: n_embd {arguments['n_embd']} is no multiple of n_head {arguments['n_head']}"
        )
    type_rows = values.get("gptchat", {}).get("type_rows", NO_TYPE_ROWS)
    return GPT2Config(**arguments, type_rows=tuple(type_rows))


def _config_value(path: Path, field: dataclasses.Field[Any], values: dict[str, Any]) -> Any:
    """The value of a field of GPT2Config; a missing key has transformers' default, as there."""
    kind: Any = int if field.name == "n_inner" else type(field.default)
    value = values.get(field.name, field.default)
    if kind is float and type(value) is int:
        value = float(value)
    if value is field.default:
        return value
    if type(value) is not kind or (kind is int and value < 1):
        raise UserError(
            f"{path}: {field.name} is {value!r}; wanted {kind.__name__}, 1 or more if it is an int"
        )
    return value


# --- weights


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


@torch.no_grad()
def _load_weights(model: GPT2, directory: Path, tied: bool) -> None:
    """Copy the files' tensors into the parameters, one by one: no file is in memory as a whole."""
    missing = dict(model.named_parameters())
    head: Tensor | None = None
    head_file = directory
    for file, stored_name, tensor in _stored_tensors(directory):
        name = stored_name.removeprefix(PREFIX)
        if name.endswith(OLD_CAUSAL_MASKS):
            continue
        if name == "lm_head.weight":
            head, head_file = tensor, file
            continue
        if name not in missing:
            raise UserError(
                f"{file}: found the tensor {stored_name}; "
                "wanted those of GPT2LMHeadModel alone, each once"
            )
        target = conv1d_layout(name, missing.pop(name))
        if target.shape != tensor.shape or not tensor.is_floating_point():
            raise UserError(
                f"{file}: {stored_name} is {tensor.dtype} {[*tensor.shape]}; "
                f"wanted floats {[*target.shape]}"
            )
        target.copy_(tensor)
    if missing or (head is None and not tied):
        lacking = ", ".join(missing) or "lm_head.weight"
        raise UserError(f"{directory}: the weights lack {lacking}; wanted all of them")
    if head is not None and not torch.equal(head.to(model.wte.weight), model.wte.weight):
        raise UserError(
            f"{head_file}: lm_head.weight differs from wte.weight; "
            "wanted a head tied to the embedding"
        )


def _stored_tensors(directory: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) of all weights in the directory."""
    for file in _weight_files(directory):
        try:
            for name, tensor in _tensors_of(file):
                yield file, name, tensor
        except UNREADABLE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file}: not a whole file of weights: {reason}") from None


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights; like transformers, it prefers safetensors."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            names = set(_read_json(index, directory).get("weight_map", {}).values())
            return [directory / name for name in sorted(names)]
    raise UserError(
        f"{directory}: found no weights; "
        "wanted model.safetensors or pytorch_model.bin, or an index of it"
    )


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file's weights, memory-mapped. Raises one of UNREADABLE."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)
        return
    mapped = zipfile.is_zipfile(file)  # torch.load cannot map the format before torch 1.6
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(loaded, dict):
        raise ValueError("no dictionary of tensors")
    if not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError("no dictionary of tensors")
    yield from loaded.items()


# --- what is generated, and what is written


def never_generated(config: GPT2Config, tokenizer: Tokenizer, task: str) -> list[int]:
    """The ids that are no text: special tokens, type rows, and rows without a token.

    The id that ends a text is not among them.
    """
    end = stop_id(tokenizer, task)
    token_bytes = tokenizer.token_bytes
    textless = [
        id for id in range(config.vocab_size) if id >= len(token_bytes) or not token_bytes[id]
    ]
    return [id for id in textless if id != end]


def stop_id(tokenizer: Tokenizer, task: str) -> int:
    """The id that ends a text: [CLS] ends a response, [EOS] a document."""
    return tokenizer.cls_id if task == "chatlm" else tokenizer.eos_id


def save_static(directory: str | Path, config: GPT2Config, tokenizer: Tokenizer, task: str) -> None:
    """Write a model directory except its weights: the configs and the tokenizer's files."""
    special_ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    model_config = dataclasses.asdict(config) | special_ids
    model_config |= {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "tie_word_embeddings": True,
        "gptchat": {"task": task, "type_rows": model_config.pop("type_rows")},
    }
    generation_config = special_ids | {
        "eos_token_id": stop_id(tokenizer, task),
        "suppress_tokens": never_generated(config, tokenizer, task),
    }
    _write_json(Path(directory, "config.json"), model_config)
    _write_json(Path(directory, "generation_config.json"), generation_config)
    tokenizer.save(directory, model_max_length=config.n_positions)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_weights(directory: str | Path, model: GPT2) -> None:
    """Replace `model.safetensors`, in the model's dtype.

    Raises UserError where it cannot be written; the old file then stays.
    """
    state = hugging_face_state(model)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    with atomic_write(Path(directory, "model.safetensors")) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt"})


# --- foreign models


@torch.no_grad()
def adapt(model: GPT2, tokenizer: Tokenizer, seed: int) -> dict[str, int]:
    """Append the special tokens and type rows that a foreign vocabulary lacks: {name: row}.

    Model and tokenizer are changed in place. Rows that the model has beyond its vocabulary are used
    first. Does nothing where nothing is missing.
    """
    config = model.config
    first = min(tokenizer.vocab_size, config.vocab_size)  # the first row without a token
    names = tokenizer.add_missing_specials()
    end = tokenizer.vocab_size
    added = dict(zip(names, range(end - len(names), end), strict=True))
    if config.type_rows == NO_TYPE_ROWS:
        added |= {"type 0": end, "type 1": end + 1}
        config = dataclasses.replace(config, type_rows=(end, end + 1))
        end += 2
    if added or end > config.vocab_size:
        config = dataclasses.replace(config, vocab_size=max(config.vocab_size, end))
        _redraw_rows(model, config, first, end, seed)
    return added


def _redraw_rows(model: GPT2, config: GPT2Config, first: int, end: int, seed: int) -> None:
    """Give the model the larger `config`, and its embedding new rows from `first` up to `end`.

    A new row is the mean of the rows before plus noise of a tenth of their deviation, so that it
    hardly changes the others' probabilities (Hewitt 2021, "Initializing New Word Embeddings").
    """
    old = model.wte.weight
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(end - first, config.n_embd, generator=generator).to(old)
    known = old[:first]
    wte = old.new_empty(config.vocab_size, config.n_embd)
    wte[: len(old)] = old
    wte[first:end] = known.mean(0) + 0.1 * known.std(0) * noise
    model.wte.weight = model.lm_head.weight = nn.Parameter(wte)
    model.wte.num_embeddings = model.lm_head.out_features = len(wte)
    model.config = config
    model.type_rows = torch.tensor(config.type_rows, device=old.device)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "convert",
        "Make anyone's GPT-2, a directory in Hugging Face layout, ready for gptchat: add the "
        "special tokens and token types that it lacks.",
        "gptchat convert --from gpt2 --to models/gpt2 --task lm",
    )
    parser.add_argument("--from", dest="source", metavar="DIR", required=True, help="the model")
    parser.add_argument("--to", dest="target", metavar="DIR", required=True, help="a new directory")
    parser.add_argument(
        "--task", choices=("lm", "chatlm"), help="default: what the directory says, else lm"
    )
    arguments = parser.parse_args(argv)
    target = Path(arguments.target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target}: is there already; wanted a new or an empty folder")
    model, tokenizer, task = load_model(arguments.source)
    added = adapt(model, tokenizer, seed=0)
    save_static(target, model.config, tokenizer, arguments.task or task)
    save_weights(target, model)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = ", ".join(f"{name} = row {row}" for name, row in added.items())
    print(f"{arguments.source}: {n_parameters:,} parameters, [EOS] is row {tokenizer.eos_id}")
    print(f"added: {rows or 'nothing, all was there'}; vocab_size is {model.config.vocab_size}")
    print(f"written: {target}")
