"""Settings files as frozen dataclasses, every key and value checked.

`Config` is a training run's TOML file: the keys `task`, `run` and `init_from`, then a section per
dataclass. On the command line, `section.key=value` or `key=value` overrides a key. `python -m
gptchat.config` writes the tables of keys in configs/README.md. `ServerSettings` is the section
`gptchat` of configs/serve/model-config.yaml.

In a config that `load_config` returns, every value is of its type, obeys its rules and fits the
others. Whether files, folders and devices exist is checked by the command that uses them.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from gptchat.console import UserError
from gptchat.files import shipped
from gptchat.settings import BACKSLASH_HINT, build, setting, table, update_tables


@dataclass(frozen=True)
class TokenizerConfig:
    """`[tokenizer]`: the vocabulary, and the text that it is trained on."""

    dir: str = setting("out/tokenizer", "folder of the tokenizer; not used with `init_from`")
    pattern: str = setting(
        "script",
        "how text is cut before it is encoded; `script` also suits text without spaces",
        choices=("gpt2", "script"),
    )
    vocab_size: int = setting(8192, "entries, of which 256 are bytes and 6 special tokens", min=262)
    files: tuple[str, ...] = setting(
        ("data/lm/speeches-late.txt", "data/lm/conversations.txt"),
        "text files that the tokenizer is trained on; globs are allowed",
    )


@dataclass(frozen=True)
class DataConfig:
    """`[data]`: the text or the dialogues, and how they become batches."""

    train: tuple[str, ...] = setting((), "files to train on; globs are allowed")
    weights: tuple[float, ...] = setting(
        (),
        "share of the rows for each entry of `train`; without weights all files are one text",
        above=0,
    )
    valid: tuple[str, ...] = setting((), "held-out files that choose the best model")
    test: tuple[str, ...] = setting((), "held-out files for `gptchat evaluate`", may_change=True)
    held_out: float = setting(
        0.0,
        "fraction of `train` held out for validation, and again for test; "
        "0 uses the files named in `valid` and `test`",
        min=0,
        below=0.5,
    )
    shards: str = setting(
        "", "folder of the encoded data; empty: `out/shards/<task>`", may_change=True
    )
    document: str = setting(
        "block",
        "LM: a document is a block between blank lines, a line, or a file",
        choices=("block", "line", "file"),
    )
    targets: str = setting(
        "response",
        "ChatLM: learn the last turn, its speaker's turns, all turns, or all tokens",
        choices=("response", "responder", "turns", "all"),
    )

    @property
    def held_out_targets(self) -> str:
        """The `targets` that a ChatLM is measured on: with "turns" the responder's only."""
        return "responder" if self.targets == "turns" else self.targets

    @property
    def learns_both_speakers(self) -> bool:
        """Whether a ChatLM learns the turns of both speakers, so that it can score either's."""
        return self.targets in ("turns", "all")


@dataclass(frozen=True)
class ModelConfig:
    """`[model]`: the size of the model. With `init_from`, a size left at 0 is that model's."""

    n_layer: int = setting(0, "transformer blocks", min=0)
    n_head: int = setting(0, "attention heads of a block; `n_embd` is a multiple of them", min=0)
    n_embd: int = setting(0, "width of the residual stream", min=0)
    n_ctx: int = setting(0, "context length in tokens", min=0)
    dropout: float = setting(0.0, "dropout of embeddings, attention and residuals", min=0, below=1)


@dataclass(frozen=True)
class TrainConfig:
    seed: int = setting(0, "seed of new weights, data order and dropout", min=0)
    num_epochs: float = setting(
        0.0, "passes over the data; set either this or `num_steps`", min=0, may_change=True
    )
    num_steps: int = setting(
        0, "optimizer steps; set either this or `num_epochs`", min=0, may_change=True
    )
    batch_size: int = setting(8, "rows of a micro-batch", min=1)
    gradient_accumulation_steps: int = setting(
        1, "micro-batches of a step, over all processes", min=1
    )
    optimizer: str = setting(
        "adamw",
        "`muon` takes the matrices of the blocks, AdamW the rest",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", above=0, may_change=True)
    embedding_learning_rate: float = setting(
        0.0, "peak learning rate of the token embedding; 0: that of AdamW", min=0, may_change=True
    )
    muon_learning_rate: float = setting(
        0.02, "peak learning rate of Muon", above=0, may_change=True
    )
    weight_decay: float = setting(0.1, "decay of matrices; biases and LayerNorms have none", min=0)
    warmup_ratio: float = setting(
        0.05, "fraction of the steps in which the rate grows to its peak", min=0, below=1
    )
    schedule: str = setting(
        "cosine",
        "how the rate falls after the warm-up",
        choices=("cosine", "linear", "constant"),
    )
    min_lr_ratio: float = setting(0.0, "the last rate, as a fraction of the peak", min=0)
    max_grad_norm: float = setting(
        1.0, "gradients are clipped to this norm; 0: never", min=0, may_change=True
    )
    eval_interval: int = setting(
        200, "steps between evaluations, each with a checkpoint", min=1, may_change=True
    )
    log_interval: int = setting(
        20, "steps between lines of the training log", min=1, may_change=True
    )
    patience: int = setting(
        0,
        "end the run after this many evaluations in a row without a better loss; 0: never",
        min=0,
        may_change=True,
    )
    precision: str = setting(
        "auto",
        "precision of the forward pass, weights stay in fp32; `auto`: bf16 if the device has it, "
        "else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
        may_change=True,
    )
    compile: bool = setting(False, "compile the model with `torch.compile`", may_change=True)
    device: str = setting(
        "auto", "`cpu`, `cuda` or another device; `auto`: CUDA if there is one", may_change=True
    )


@dataclass(frozen=True)
class Config:
    task: str = setting(
        "lm", "`lm` continues text, `chatlm` answers dialogues", choices=("lm", "chatlm")
    )
    run: str = setting("out/lm", "folder of everything that the run writes", may_change=True)
    init_from: str = setting(
        "", "model directory to start from, ours or any Hugging Face GPT-2; empty: new weights"
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()

    @property
    def shards_dir(self) -> Path:
        return Path(self.data.shards or f"out/shards/{self.task}")


@dataclass(frozen=True)
class ServerSettings:
    """The section `gptchat` of configs/serve/model-config.yaml: engine and limits of one model."""

    dtype: str = setting(
        "auto", "dtype of the linear layers", choices=("auto", "float32", "bfloat16", "int8")
    )
    slots: int = setting(32, "sequences decoded at once, if the cache has room", min=1)
    cache_mb: int = setting(4096, "memory of the KV cache in MB", min=1)
    threads: int = setting(0, "threads of the decoder; 0: all cores", min=0)
    prefix_cache: bool = setting(True, "reuse keys and values of a conversation's earlier turns")
    max_requests: int = setting(128, "requests being answered or queued, at once", min=1)
    max_new_tokens: int = setting(1024, "tokens of one answer, never more than the context", min=1)
    hosts: tuple[str, ...] = setting(
        (), "names in a request's Host header, besides localhost, any IP address and --host"
    )


def flatten(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def keys_that_may_change(cls: type, prefix: str = "") -> set[str]:
    """The keys that a resumed run may have other values of, as "section.key"."""
    keys = set()
    for field in dataclasses.fields(cls):
        if field.metadata.get("may_change"):
            keys.add(prefix + field.name)
        elif dataclasses.is_dataclass(field.default):
            keys |= keys_that_may_change(type(field.default), f"{field.name}.")
    return keys


FREE_KEYS = keys_that_may_change(Config)


def build_server_settings(values: Any, source: str) -> ServerSettings:
    """The section `gptchat` of a parsed model-config.yaml, checked; `source` is the file."""
    section = values.get("gptchat") if isinstance(values, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{source}: found no section gptchat; wanted the server's settings in it")
    return build(ServerSettings, section, source, "gptchat")


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` or `key=value` overrides, in order."""
    values = _read_toml(path)
    for override in overrides:
        _apply_override(values, override)
    source = path
    if overrides:
        source = f"{path} with {' '.join(overrides)}"
    config = build(Config, values, source)
    _check_combinations(config, source)
    return config


def load_run_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a run, which must name files for training and validation."""
    config = load_config(path, overrides)
    if not config.data.train:
        raise UserError(f"{path}: [data] train: found no files named; wanted some")
    if not config.data.valid and config.data.held_out == 0:
        raise UserError(
            f"{path}: [data] valid: found no files named; wanted some, or held_out above 0, "
            "to take it from train"
        )
    return config


def find_config(path: str) -> Path:
    """The file that a command line names.

    A missing `configs/...` is the one that ships with gptchat, as a line on stderr says: what the
    documents show works without a checkout, too.
    """
    named = Path(path)
    own = shipped("configs").joinpath(*named.parts[1:])
    if named.exists() or named.parts[:1] != ("configs",) or not own.is_file():
        return named
    print(f"{path}: not in this folder; gptchat's own is used", file=sys.stderr)
    return own


def _read_toml(path: str) -> dict[str, Any]:
    text = ""
    try:
        text = find_config(path).read_text(encoding="utf-8-sig")
        return tomli.loads(text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; wanted a TOML file like configs/lm.toml"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {error.start}; wanted a TOML file in it"
        ) from None
    except tomli.TOMLDecodeError as error:
        hint = f"; {BACKSLASH_HINT}" if "\\" in text else ""
        raise UserError(f"{path}: not valid TOML: {error}{hint}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(
            f"{override!r}: found no '='; wanted section.key=value, "
            "such as train.learning_rate=1e-3"
        )
    *sections, key = name.split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"{override!r}: {section} is a value, not a section")
    table[key] = _parse_value(text)


def _parse_value(text: str) -> Any:
    """The text as a TOML value, or the text itself: a string needs no quotes."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def _check_combinations(config: Config, source: str) -> None:
    """Raise UserError for values that do not go together."""
    if (config.train.num_epochs > 0) == (config.train.num_steps > 0):
        raise UserError(f"{source}: [train] wants exactly one of num_epochs and num_steps above 0")
    folders = [config.run, config.tokenizer.dir, str(config.shards_dir)]
    if len(set(map(os.path.normpath, folders))) < 3:
        raise UserError(
            f"{source}: run, [tokenizer] dir and [data] shards: found {', '.join(folders)}; "
            "wanted three folders"
        )
    data = config.data
    if data.held_out > 0 and (data.valid or data.test):
        raise UserError(
            f"{source}: [data] wants either held_out above 0, by which valid and test are taken "
            "from train, or files for valid and test"
        )
    if data.weights and len(data.weights) != len(data.train):
        raise UserError(
            f"{source}: [data] weights: found {len(data.weights)}; "
            f"wanted {len(data.train)}, one for each entry of train"
        )
    size = config.model
    if size.n_embd % max(1, size.n_head) != 0:
        raise UserError(
            f"{source}: [model] n_embd {size.n_embd} is no multiple of n_head {size.n_head}"
        )
    has_all_sizes = min(size.n_layer, size.n_head, size.n_embd, size.n_ctx) > 0
    if not has_all_sizes and not config.init_from:
        raise UserError(
            f"{source}: [model] wants n_layer, n_head, n_embd and n_ctx, "
            "or init_from a model directory"
        )


def tables() -> dict[str, str]:
    """The tables of keys in configs/README.md, by the names in their markers."""
    classes = [Config, TokenizerConfig, DataConfig, ModelConfig, TrainConfig]
    keys = ", ".join(f"`{key}`" for key in sorted(FREE_KEYS))
    return {cls.__name__: table(cls) for cls in classes} | {"may change": keys}


if __name__ == "__main__":
    update_tables(shipped("configs") / "README.md", tables())
