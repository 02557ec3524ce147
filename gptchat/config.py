"""TOML -> frozen dataclasses, and the two things every command shares: one-line errors and progress.

A config file has one table per dataclass below. Unknown keys, wrong types and impossible values are errors that name
the file and the key; nothing is silently replaced by a default. On the command line `section.key=value` overrides.
"""

import dataclasses
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tomli

from gptchat.console import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerConfig:
    dir: str = "out/tokenizer"
    kind: str = field(default="bpe", metadata={"choices": ("bpe", "unigram")})
    vocab_size: int = field(default=8192, metadata={"min": 262})  # 256 bytes and 6 special tokens
    files: tuple[str, ...] = ("data/lm/train.txt",)
    sample_mb: float = field(
        default=100.0, metadata={"above": 0}
    )  # text sampled for training, spread over all files


@dataclass(frozen=True)
class DataConfig:
    train: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    shards: str = ""  # folder of the encoded data; "" stands for out/shards/<task>
    document: str = field(default="block", metadata={"choices": ("block", "line", "file")})
    targets: str = field(default="response", metadata={"choices": ("response", "all")})
    packed: bool = True


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = field(
        default=0, metadata={"min": 0}
    )  # sizes left at 0 are those of the model that init_from names
    n_head: int = field(default=0, metadata={"min": 0})
    n_embd: int = field(default=0, metadata={"min": 0})
    n_ctx: int = field(default=0, metadata={"min": 0})
    dropout: float = field(
        default=0.0, metadata={"min": 0, "below": 1}
    )  # embeddings, attention and residuals alike


@dataclass(frozen=True)
class TrainConfig:
    seed: int = field(default=0, metadata={"min": 0})
    num_epochs: float = field(default=0.0, metadata={"min": 0})  # either this or num_steps
    num_steps: int = field(default=0, metadata={"min": 0})
    batch_size: int = field(default=8, metadata={"min": 1})  # rows of one micro-batch
    gradient_accumulation_steps: int = field(
        default=1, metadata={"min": 1}
    )  # micro-batches of one step, all processes together
    optimizer: str = field(
        default="adamw", metadata={"choices": ("adamw", "muon")}
    )  # muon: for the matrices only
    learning_rate: float = field(default=1e-3, metadata={"above": 0})
    muon_learning_rate: float = field(default=0.02, metadata={"above": 0})
    weight_decay: float = field(default=0.1, metadata={"min": 0})
    beta1: float = field(default=0.9, metadata={"min": 0, "below": 1})
    beta2: float = field(default=0.95, metadata={"min": 0, "below": 1})
    warmup_ratio: float = field(
        default=0.05, metadata={"min": 0, "below": 1}
    )  # share of all steps spent warming up
    schedule: str = field(default="cosine", metadata={"choices": ("cosine", "linear", "constant")})
    min_lr_ratio: float = field(
        default=0.0, metadata={"min": 0}
    )  # where the schedule ends, as a share of the rate
    max_grad_norm: float = field(default=1.0, metadata={"min": 0})  # 0: no clipping
    eval_interval: int = field(default=200, metadata={"min": 1})
    log_interval: int = field(default=20, metadata={"min": 1})
    patience: int = field(
        default=0, metadata={"min": 0}
    )  # evaluations without progress before stopping; 0: never
    keep_type_rows: bool = (
        False  # ChatLM from an LM: keep the type rows instead of drawing them anew
    )
    precision: str = field(default="bf16", metadata={"choices": ("fp32", "bf16", "fp16")})
    compile: bool = False
    activation_checkpointing: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Config:
    task: str = field(default="lm", metadata={"choices": ("lm", "chatlm")})
    run: str = "out/lm"  # everything that the run writes
    init_from: str = ""  # a model directory to start from: one of ours or anyone's GPT-2
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

    dtype: str = field(
        default="float32", metadata={"choices": ("auto", "float32", "bfloat16", "int8")}
    )
    slots: int = field(default=32, metadata={"min": 1})  # sequences decoded at once
    cache_mb: int = field(default=4096, metadata={"min": 1})  # the KV cache; limits the slots
    threads: int = field(default=0, metadata={"min": 0})  # of the decoder; 0: all cores
    max_requests: int = field(default=128, metadata={"min": 1})  # answered or queued
    max_new_tokens: int = field(default=1024, metadata={"min": 1})
    default_new_tokens: int = field(default=64, metadata={"min": 1})
    max_candidates: int = field(default=16, metadata={"min": 1})  # of one prompt
    max_prompts: int = field(default=64, metadata={"min": 1})  # of one request, times candidates
    max_stops: int = field(default=8, metadata={"min": 1})  # stop strings
    max_bad_words: int = field(default=64, metadata={"min": 1})
    max_logprobs: int = field(default=20, metadata={"min": 0})  # best tokens beside the drawn one


def build_server_settings(values: Any, source: str) -> ServerSettings:
    """The section `gptchat` of a parsed model-config.yaml.

    Raises UserError that names the file, `source`, and the key.
    """
    section = values.get("gptchat") if isinstance(values, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{source}: found no section gptchat; wanted the server's settings in it")
    return build(ServerSettings, section, source, "gptchat")


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides. Raises UserError naming the file and the key."""
    try:
        values = tomli.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; wanted a TOML file like configs/lm.toml"
        ) from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{override!r}: found no '='; wanted section.key=value, such as train.learning_rate=1e-3"
            )
        table = values
        *sections, name = key.split(".")
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UserError(f"{override!r}: {section} is a value, not a section")
        table[name] = _parse_value(text)
    source = " ".join([path, *["with"][: len(overrides)], *overrides])
    config = build(Config, values, source)
    if (config.train.num_epochs > 0) == (config.train.num_steps > 0):
        raise UserError(f"{source}: [train] wants exactly one of num_epochs and num_steps above 0")
    size = config.model
    if size.n_embd % max(1, size.n_head):
        raise UserError(f"{source}: [model] n_embd {size.n_embd} is no multiple of n_head")
    if not config.init_from and min(size.n_layer, size.n_head, size.n_embd, size.n_ctx) < 1:
        raise UserError(
            f"{source}: [model] wants n_layer, n_head, n_embd and n_ctx, or init_from a model directory"
        )
    return config


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (so that a string needs no quotes)."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        return text


def build(cls: type[T], values: dict[str, Any], source: str, section: str = "") -> T:
    """An instance of the dataclass `cls` from a parsed table; every key and type is checked."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        where = f"{source}: [{section}] {key}" if section else f"{source}: {key}"
        if key not in fields:
            raise UserError(f"{where}: unknown key; wanted one of {', '.join(fields)}")
        arguments[key] = _checked(hints[key], fields[key].metadata, value, source, where, key)
    return cls(**arguments)


def _checked(hint: Any, rules: Any, value: Any, source: str, where: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where}: found {value!r}; wanted a section [{key}]")
        return build(typing.cast(type, hint), value, source, key)
    if typing.get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise UserError(f"{where}: found {value!r}; wanted a string or a list of strings")
        return tuple(items)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or hint is float and not math.isfinite(value):
        raise UserError(f"{where}: found {value!r}; wanted a value of type {hint.__name__}")
    for rule, allowed, wanted in (
        ("choices", lambda limit: value in limit, "one of"),
        ("min", lambda limit: value >= limit, "at least"),
        ("above", lambda limit: value > limit, "a value above"),
        ("below", lambda limit: value < limit, "a value below"),
    ):
        if rule in rules and not allowed(rules[rule]):
            raise UserError(f"{where}: found {value!r}; wanted {wanted} {rules[rule]}")
    return value
