"""Model directories in Hugging Face layout, read and written.

Reads directories written here and anyone's GPT-2; what our model cannot compute exactly is refused.
Writes what transformers' GPT2LMHeadModel.from_pretrained and AutoTokenizer read, sampling defaults
included. The weights are `weights.py`'s.

A foreign vocabulary lacks our special tokens, and a foreign model the rows of its token types.
`adapt` appends both. `gptchat convert` (`convert.py`) does so to a whole directory.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptchat.console import UserError
from gptchat.data.chat_template import CHAT_TEMPLATE
from gptchat.data.tokenizer import Tokenizer
from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2, NO_TYPE_ROWS, GPT2Config, model_on_meta
from gptchat.model.weights import load_weights, read_json
from gptchat.model.weights import save_weights as save_weights
from gptchat.settings import build, declared

# What these keys of config.json may be; the first value is the default. The other keys that are
# not in GPT2Config are about training and generation, or, like `reorder_and_upcast_attn`, about
# rounding.
SUPPORTED = {
    "model_type": ("gpt2",),
    "architectures": (["GPT2LMHeadModel"], ["GPT2Model"], None),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}
TASKS = ("lm", "chatlm")


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
    values = read_json(path)
    config = _model_config(path, values)
    if dropout is not None:
        config = dataclasses.replace(
            config, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout
        )
    task = _own_values(path, values).get("task", "lm")
    if task not in TASKS:
        raise UserError(f"{path}: task is {task!r:.80}; wanted {' or '.join(TASKS)}")
    tokenizer = Tokenizer.load(directory)
    beyond_model = tokenizer.token_bytes[config.vocab_size :]
    if any(beyond_model):  # special tokens, which have no bytes, may get their rows later
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} entries; "
            f"wanted {config.vocab_size}"
        )
    model = model_on_meta(config)
    load_weights(model, directory, device, dtype, tied=values.get("tie_word_embeddings", True))
    return model.eval(), tokenizer, task


def _model_config(path: Path, values: dict[str, Any]) -> GPT2Config:
    """The config of a config.json; a missing key has transformers' default, as there."""
    for key, supported in SUPPORTED.items():
        value = values.get(key, supported[0])
        if value not in supported:
            raise UserError(
                f"{path}: {key} is {value!r:.80}; wanted {' or '.join(map(str, supported))}"
            )
    known = {key: values[key] for key in declared(GPT2Config) if key in values}
    config = build(GPT2Config, known, str(path))
    if config.n_embd % config.n_head:
        raise UserError(f"{path}: n_embd {config.n_embd} is no multiple of n_head {config.n_head}")
    rows = _own_values(path, values).get("type_rows", [*NO_TYPE_ROWS])
    if rows != [*NO_TYPE_ROWS]:
        allowed = range(config.vocab_size)
        if not isinstance(rows, list) or len(rows) != 2 or not all(row in allowed for row in rows):
            raise UserError(
                f"{path}: type_rows is {rows!r:.80}; wanted two rows below {config.vocab_size}"
            )
    return dataclasses.replace(config, type_rows=tuple(rows))


def _own_values(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What gptchat has written about its model; nothing in a foreign config."""
    own = values.get("gptchat", {})
    if not isinstance(own, dict):
        raise UserError(f"{path}: gptchat is {own!r:.80}; wanted a table")
    return own


# --- what is generated, and what is written


@dataclass(frozen=True)
class AnswerDefaults:
    """How a model answers where a request does not say: kept in its generation_config.json.

    `sampling` holds settings of `gptchat.inference.sampling.Sampling` by name, unchecked.
    `candidates` answers are drawn, and `pick` names the rule that chooses among them.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    candidates: int = 1
    pick: str = "first"


TRAINED_HERE = AnswerDefaults(
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.15}
)
# These have the same name and meaning in transformers; vLLM honours the same ones.
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def suitable_defaults(task: str, n_parameters: int, targets: str) -> AnswerDefaults:
    """The defaults of a model trained here: how many candidates its answers may cost.

    A small ChatLM picks among many if it has learned to speak for both sides: the default one among
    25, in 0.3 s on two cores of a CPU without VNNI. A large one answers at once.
    """
    candidates = min(50, 75_000_000 // n_parameters)
    if task == "chatlm" and targets in ("turns", "all") and candidates > 1:
        sampling = TRAINED_HERE.sampling | {"temperature": 0.8}  # candidates that differ
        return AnswerDefaults(sampling, candidates, "mmi")
    return TRAINED_HERE


def answer_defaults(directory: str | Path) -> AnswerDefaults:
    """What a directory's generation_config.json says; neutral settings without that file.

    Raises UserError for a file that cannot be read.
    """
    path = Path(directory, "generation_config.json")
    if not path.exists():
        return AnswerDefaults()
    values = read_json(path)
    sampling = {key: values[key] for key in SAMPLING_KEYS if values.get(key) is not None}
    own = _own_values(path, values)
    candidates, pick = own.get("candidates", 1), own.get("pick", "first")
    if type(candidates) is not int or candidates < 1 or not isinstance(pick, str):
        raise UserError(
            f"{path}: gptchat is {own!r:.80}; wanted candidates of 1 or more, and the name of pick"
        )
    return AnswerDefaults(sampling, candidates, pick)


def never_generated(config: GPT2Config, tokenizer: Tokenizer, task: str) -> list[int]:
    """The ids that are no text: special tokens, type rows, and rows without a token.

    The id that ends a text is not among them.
    """
    ends = stop_ids(config, tokenizer, task)
    token_bytes = tokenizer.token_bytes
    textless = [
        id for id in range(config.vocab_size) if id >= len(token_bytes) or not token_bytes[id]
    ]
    return [id for id in textless if id not in ends]


def stop_id(tokenizer: Tokenizer, task: str) -> int:
    """The id that ends a text: [CLS] ends a response, [EOS] a document."""
    return tokenizer.cls_id if task == "chatlm" else tokenizer.eos_id


def stop_ids(config: GPT2Config, tokenizer: Tokenizer, task: str) -> tuple[int, ...]:
    """The id that ends a text; none where the tokenizer or the model has no such token."""
    id = stop_id(tokenizer, task)
    return (id,) if 0 <= id < config.vocab_size else ()


def save_static(
    directory: str | Path,
    config: GPT2Config,
    tokenizer: Tokenizer,
    task: str,
    defaults: AnswerDefaults = TRAINED_HERE,
) -> None:
    """Write a model directory except its weights: the configs and the tokenizer's files."""
    special_ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    values = dataclasses.asdict(config)
    ours = {
        key.name: values.pop(key.name)
        for key in dataclasses.fields(config)
        if "ours" in key.metadata
    }
    model_config = values | special_ids
    model_config |= {
        "n_ctx": config.n_positions,  # the name that llama.cpp's converter looks for
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "tie_word_embeddings": True,
        "gptchat": {"task": task} | ours,
    }
    generation_config = special_ids | {
        "eos_token_id": stop_id(tokenizer, task),
        "suppress_tokens": never_generated(config, tokenizer, task),
        "do_sample": defaults.sampling.get("temperature") != 0,
        "gptchat": {"candidates": defaults.candidates, "pick": defaults.pick},
    }
    generation_config |= defaults.sampling
    _write_json(Path(directory, "config.json"), model_config)
    _write_json(Path(directory, "generation_config.json"), generation_config)
    chat_template = CHAT_TEMPLATE if task == "chatlm" else None
    tokenizer.save(directory, config.n_positions, chat_template)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


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
