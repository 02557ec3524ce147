"""A model directory in Hugging Face layout, read and written: ours and anyone's GPT-2.

Read: `model.safetensors` or `pytorch_model.bin`, sharded or not, with or without the `transformer.` prefix. Written:
what transformers' GPT2LMHeadModel.from_pretrained and AutoTokenizer read. Its linear layers are Conv1D, (in, out), so
their weights are transposed on the way. What this model cannot compute exactly is refused.
"""

import argparse
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

from gptchat.console import UserError
from gptchat.data.tokenizer import Tokenizer
from gptchat.files import atomic_write
from gptchat.model.gpt2 import ACTIVATIONS, GPT2, GPT2Config

PREFIX = "transformer."
NO_TYPE_ROWS = (-1, -1)  # a foreign model before `adapt`
WANTED = {  # config.json: what each of these must be where it stands; `reorder_and_upcast_attn` changes rounding only
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

    `dropout` replaces the three rates of config.json. A foreign model is an "lm" and has no type rows until `adapt`.
    Raises UserError for a directory that is damaged, incomplete, or of a model that this one cannot represent.
    """
    directory = Path(directory)
    found = _read_json(directory / "config.json", directory)
    config = _model_config(directory / "config.json", found)
    if dropout is not None:
        config = dataclasses.replace(
            config, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout
        )
    tokenizer = Tokenizer.load(directory)
    if any(
        tokenizer.token_bytes[config.vocab_size :]
    ):  # special tokens alone may be added to the model later
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} entries; wanted {config.vocab_size}"
        )
    with torch.device("meta"):
        model = GPT2(config)
    model = model.to(dtype).to_empty(device=device)
    model.lm_head.weight = model.wte.weight
    model.type_rows = torch.tensor(config.type_rows, device=device)
    _load_weights(model, directory, tied=found.get("tie_word_embeddings", True))
    return model.eval(), tokenizer, found.get("gptchat", {}).get("task", "lm")


def _read_json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{directory}: {f'found no {path.name}' if directory.is_dir() else 'no such directory'}; "
            "wanted a model directory in Hugging Face layout"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return {**value}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object: {error}") from None


def _model_config(path: Path, found: dict[str, Any]) -> GPT2Config:
    for key, wanted in WANTED.items():
        if found.get(key, wanted[0]) not in wanted:
            raise UserError(
                f"{path}: {key} is {found.get(key)!r}; wanted {' or '.join(map(str, wanted))}"
            )
    values: dict[str, Any] = {}
    for field in dataclasses.fields(GPT2Config):
        kind: Any = int if field.name == "n_inner" else type(field.default)
        value = found.get(
            field.name, field.default
        )  # keys that are missing have transformers' defaults
        value = float(value) if kind is float and type(value) is int else value
        if value is not field.default and (type(value) is not kind or kind is int and value < 1):
            raise UserError(
                f"{path}: {field.name} is {value!r}; wanted {kind.__name__}, 1 or more if it is an int"
            )
        values[field.name] = value
    values["type_rows"] = tuple(found.get("gptchat", {}).get("type_rows", NO_TYPE_ROWS))
    if values["n_embd"] % values["n_head"]:
        raise UserError(
            f"{path}: n_embd {values['n_embd']} is no multiple of n_head {values['n_head']}"
        )
    return GPT2Config(**values)


@torch.no_grad()
def _load_weights(model: GPT2, directory: Path, tied: bool) -> None:
    """Copy each tensor of the files into its parameter, one by one: the files are mapped, nothing is held twice."""
    missing, head = dict(model.named_parameters()), None
    for file, name, tensor in _tensors(directory):
        key = name.removeprefix(PREFIX)
        if key.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks of older transformers
            continue
        if key == "lm_head.weight":
            head = (file, tensor)
            continue
        if (parameter := missing.pop(key, None)) is None:
            raise UserError(
                f"{file}: found the tensor {name}; wanted those of GPT2LMHeadModel alone, each once"
            )
        target = parameter.T if _is_conv1d(key) else parameter
        if target.shape != tensor.shape or not tensor.is_floating_point():
            raise UserError(
                f"{file}: {name} is {tensor.dtype} {[*tensor.shape]}; wanted floats {[*target.shape]}"
            )
        target.copy_(tensor)
    if missing or (head is None and not tied):
        raise UserError(
            f"{directory}: the weights lack {', '.join(missing) or 'lm_head.weight'}; wanted all of them"
        )
    if head is not None and not torch.equal(head[1].to(model.wte.weight), model.wte.weight):
        raise UserError(
            f"{head[0]}: lm_head.weight differs from wte.weight; wanted a head tied to the embedding"
        )


def _is_conv1d(key: str) -> bool:
    return ".c_" in key and key.endswith(".weight")


def _tensors(directory: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) of all weight files, in the order of transformers' choice: safetensors first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            files = [name]
        elif index.is_file():
            files = sorted(set(_read_json(index, directory).get("weight_map", {}).values()))
        else:
            continue
        for file in files:
            yield from _tensors_of(directory / file)
        return
    raise UserError(
        f"{directory}: found no weights; wanted model.safetensors or pytorch_model.bin, or an index of it"
    )


def _tensors_of(file: Path) -> Iterator[tuple[Path, str, Tensor]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    yield file, name, opened.get_tensor(name)
            return
        loaded = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
        if not isinstance(loaded, dict) or not all(
            isinstance(value, Tensor) for value in loaded.values()
        ):
            raise ValueError("no dictionary of tensors")
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: not a whole file of weights: {reason}") from None
    yield from ((file, name, tensor) for name, tensor in loaded.items())


def never_generated(config: GPT2Config, tokenizer: Tokenizer, task: str) -> list[int]:
    """The ids that are no text, but for the one that ends it: special tokens, type rows, rows without a token."""
    return [
        i
        for i in range(config.vocab_size)
        if i != stop_id(tokenizer, task) and not any(tokenizer.token_bytes[i : i + 1])
    ]


def stop_id(tokenizer: Tokenizer, task: str) -> int:
    """The id that ends a text: [CLS] ends a response, [EOS] a document."""
    return tokenizer.cls_id if task == "chatlm" else tokenizer.eos_id


def save_static(directory: str | Path, config: GPT2Config, tokenizer: Tokenizer, task: str) -> None:
    """Write all of a model directory but the weights: config.json, generation_config.json and the tokenizer's files."""
    values = dataclasses.asdict(config)
    ours = {"task": task, "type_rows": values.pop("type_rows")}
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    about = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "tie_word_embeddings": True,
        "gptchat": ours,
    }
    generation = {
        "eos_token_id": stop_id(tokenizer, task),
        "suppress_tokens": never_generated(config, tokenizer, task),
    }
    for name, content in (
        ("config.json", values | ids | about),
        ("generation_config.json", ids | generation),
    ):
        with atomic_write(Path(directory, name)) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(directory, model_max_length=config.n_positions)


def save_weights(directory: str | Path, model: GPT2) -> None:
    """Swap in `model.safetensors`, in the model's dtype. Raises UserError where it cannot; the old file then stays."""
    tensors = {
        PREFIX + key: (value.T if _is_conv1d(key) else value).detach().contiguous()
        for key, value in model.named_parameters()
    }  # the tied head stands here once, as wte
    with atomic_write(Path(directory, "model.safetensors")) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(0, str(error)) from None


@torch.no_grad()
def adapt(model: GPT2, tokenizer: Tokenizer, seed: int) -> dict[str, int]:
    """Append to both, in place, the special tokens and type rows that a foreign vocabulary lacks: {name: row}.

    A new row is the mean of the vocabulary's plus noise of a tenth of their deviation, so that the others' logits keep
    their sense (Hewitt 2021, "Initializing New Word Embeddings"). Rows that the model holds in reserve are used first.
    """
    config, old = model.config, model.wte.weight
    first = min(tokenizer.vocab_size, config.vocab_size)
    names = tokenizer.add_missing_specials()
    end = tokenizer.vocab_size
    added = dict(zip(names, range(end - len(names), end), strict=True))
    if config.type_rows == NO_TYPE_ROWS:
        added |= {"type 0": end, "type 1": end + 1}
        config, end = dataclasses.replace(config, type_rows=(end, end + 1)), end + 2
    if added or end > len(old):
        wte = old.new_empty(max(config.vocab_size, end), config.n_embd)
        wte[: len(old)] = old
        noise = torch.randn(
            end - first, config.n_embd, generator=torch.Generator().manual_seed(seed)
        ).to(old)
        wte[first:end] = old[:first].mean(0) + 0.1 * old[:first].std(0) * noise
        model.wte.weight = model.lm_head.weight = nn.Parameter(wte)
        model.wte.num_embeddings = model.lm_head.out_features = len(wte)
        model.config = dataclasses.replace(config, vocab_size=len(wte))
        model.type_rows = torch.tensor(config.type_rows, device=old.device)
    return added


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Make a GPT-2 directory of Hugging Face's layout ready for gptchat"
    )
    parser.add_argument("--from", dest="source", required=True, help="anyone's GPT-2")
    parser.add_argument("--to", dest="target", required=True, help="the new directory")
    parser.add_argument(
        "--task", choices=("lm", "chatlm"), help="default: what the directory says, else lm"
    )
    arguments = parser.parse_args(argv)
    target = Path(arguments.target)
    if target.is_file() or target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: is there already; wanted a new or an empty folder")
    model, tokenizer, task = load_model(arguments.source)
    added = adapt(model, tokenizer, seed=0)
    save_static(target, model.config, tokenizer, arguments.task or task)
    save_weights(target, model)
    rows = (
        ", ".join(f"{name} = row {row}" for name, row in added.items()) or "nothing, all was there"
    )
    print(
        f"{arguments.source}: {sum(p.numel() for p in model.parameters()):,} parameters, [EOS] is row "
        f"{tokenizer.eos_id}\nadded: {rows}; vocab_size is {model.config.vocab_size}\nwritten: {target}"
    )
