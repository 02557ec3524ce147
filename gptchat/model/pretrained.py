"""Model directories in Hugging Face layout, read and written.

`load_model` reads a directory written here or anyone's GPT-2, and refuses what our model cannot
compute exactly. `save_static` and `save_weights` write what transformers reads as it is, with the
defaults of sampling. A foreign model lacks special tokens and token types: `convert.adapt` appends
them.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptchat.console import UserError
from gptchat.data.dialogue import CHAT_TEMPLATE
from gptchat.data.tokenizer import Tokenizer
from gptchat.files import atomic_write
from gptchat.model.gpt2 import GPT2, NO_TYPE_ROWS, GPT2Config, model_on_meta
from gptchat.model.weights import load_weights, read_json
from gptchat.model.weights import save_weights as save_weights
from gptchat.settings import build, declared

# What these keys of config.json may be; the first value is the default. Other keys that are not in
# GPT2Config do not change what is computed, except its rounding (`reorder_and_upcast_attn`).
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

    `dropout` replaces the three rates of config.json. A foreign model is an "lm" without type rows.
    Raises UserError for a directory that is incomplete or damaged, or whose model ours cannot
    represent.
    """
    directory = Path(directory)
    path = directory / "config.json"
    values = read_json(path)
    own = _own_values(path, values)
    config = _model_config(path, values, own.get("type_rows", [*NO_TYPE_ROWS]))
    if dropout is not None:
        config = dataclasses.replace(
            config, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout
        )
    task = own.get("task", "lm")
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


def _model_config(path: Path, values: dict[str, Any], type_rows: Any) -> GPT2Config:
    """The config in the values of a config.json. A missing key has transformers' default."""
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
    if type_rows != [*NO_TYPE_ROWS]:
        is_pair = isinstance(type_rows, list) and len(type_rows) == 2
        if not is_pair or not all(row in range(config.vocab_size) for row in type_rows):
            raise UserError(
                f"{path}: type_rows is {type_rows!r:.80}; wanted two rows below {config.vocab_size}"
            )
    return dataclasses.replace(config, type_rows=tuple(type_rows))


def _own_values(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What gptchat has added to a JSON file; nothing in a foreign one."""
    own = values.get("gptchat", {})
    if not isinstance(own, dict):
        raise UserError(f"{path}: gptchat is {own!r:.80}; wanted a table")
    return own


@dataclass(frozen=True)
class AnswerDefaults:
    """How a model answers unless a request says otherwise; kept in generation_config.json.

    `sampling` holds settings of `inference.sampling.Sampling` by name, unchecked. `candidates`
    answers are drawn, of which the rule `pick` chooses one.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    candidates: int = 1
    pick: str = "first"


TRAINED_HERE = AnswerDefaults(
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.15}
)
# They have the same names and meanings in transformers and vLLM.
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def suitable_defaults(task: str, n_parameters: int, learns_both_speakers: bool) -> AnswerDefaults:
    """The defaults of a model trained here.

    A ChatLM that has learned both speakers' turns can score candidates (mmi). The smaller it is,
    the more it draws: the default one 25, which take 0.3 s on two slow cores.
    """
    candidates = min(50, 75_000_000 // n_parameters)
    if task == "chatlm" and learns_both_speakers and candidates > 1:
        sampling = TRAINED_HERE.sampling | {"temperature": 0.8}  # candidates that differ
        return AnswerDefaults(sampling, candidates, "mmi")
    return TRAINED_HERE


def answer_defaults(directory: str | Path) -> AnswerDefaults:
    """The defaults in a directory's generation_config.json; neutral ones without that file."""
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


def stop_ids(config: GPT2Config, tokenizer: Tokenizer, task: str) -> tuple[int, ...]:
    """The id that ends a text: [CLS] ends a response, [EOS] a document.

    Empty if the tokenizer lacks the token, or the model its row.
    """
    id = tokenizer.cls_id if task == "chatlm" else tokenizer.eos_id
    return (id,) if 0 <= id < config.vocab_size else ()


def never_generated(config: GPT2Config, tokenizer: Tokenizer, task: str) -> list[int]:
    """The ids that have no text (special tokens, type rows, unused rows), but for `stop_ids`."""
    with_text = {id for id, piece in enumerate(tokenizer.token_bytes) if piece}
    generated = with_text.union(stop_ids(config, tokenizer, task))
    return [id for id in range(config.vocab_size) if id not in generated]


def save_static(
    directory: str | Path,
    config: GPT2Config,
    tokenizer: Tokenizer,
    task: str,
    defaults: AnswerDefaults = TRAINED_HERE,
) -> None:
    """Write all of a model directory but its weights. [EOS], and [CLS] of a ChatLM, must exist."""
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
    (stop,) = stop_ids(config, tokenizer, task)
    generation_config = special_ids | {
        "eos_token_id": stop,
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
