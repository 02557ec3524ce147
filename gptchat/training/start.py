"""The model and the tokenizer that a run starts from: new weights, or those that `init_from` names.

Everything random here is drawn from the config's seed, so that the same config starts from the same
weights.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from gptchat.config import Config
from gptchat.console import UserError
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.model import pretrained
from gptchat.model.devices import multiplies_bfloat16
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.training.distributed import World
from gptchat.training.metrics import resolve_precision


def choose_precision(config: Config, world: World) -> Config:
    """The config with the precision that its "auto" stands for on the device of this run.

    Warns of bf16 on a device that has to convert every number.
    """
    precision = resolve_precision(config.train.precision, world.device)
    if precision == "bf16" and world.rank == 0 and not multiplies_bfloat16(world.device):
        print(
            "warning: train.precision bf16 on a device without instructions for it, where it is "
            "many times slower than fp32; auto chooses by the device",
            file=sys.stderr,
        )
    return replace(config, train=replace(config.train, precision=precision))


def start_model(config: Config) -> tuple[GPT2, Tokenizer]:
    """A new model of the config's size, or the one that `init_from` names."""
    torch.manual_seed(config.train.seed)
    if config.init_from:
        return load_start_model(config)
    tokenizer = tokenizer_for(config)
    return GPT2(GPT2Config.of(config.model, tokenizer.vocab_size)), tokenizer


def start_directory(config: Config) -> str:
    """The model directory that a run loads at its start; "" stands for new weights.

    It is `init_from`. Where that is gone, a run that has a checkpoint loads its own best model: it
    has the same size and tokenizer, and the weights come from the checkpoint.
    """
    own = Path(config.run, "model")
    has_begun = Path(config.run, "checkpoint.safetensors").is_file()
    can_load_own = has_begun and Path(own, "model.safetensors").is_file()
    if config.init_from and can_load_own and not Path(config.init_from).is_dir():
        return str(own)
    return config.init_from


def fingerprint(config: Config, model: GPT2) -> list[float] | None:
    """What tells the model that a run starts from, `model`, from others; [] for new weights.

    None where `init_from` is gone, so that it cannot be told.
    """
    if not config.init_from:
        return []
    if start_directory(config) != config.init_from:
        return None
    return model.ln_f.weight[:4].tolist()  # any training changes these


def load_start_model(config: Config) -> tuple[GPT2, Tokenizer]:
    """The model that `init_from` names; special tokens and token types that it lacks are appended.

    A ChatLM draws the type rows of an LM anew, N(0, initializer_range): LM training has seen them
    only as outputs that are never right. `keep_type_rows` leaves them. Raises UserError if the
    model is not of the size that the config wants.
    """
    model, tokenizer, model_task = pretrained.load_model(
        start_directory(config), dropout=config.model.dropout
    )
    check_size(config, model.config)
    appended = pretrained.adapt(model, tokenizer, config.train.seed)
    was_lm = config.task == "chatlm" and model_task == "lm"
    if was_lm and "type 0" not in appended and not config.train.keep_type_rows:
        rows = torch.randn(2, model.config.n_embd) * model.config.initializer_range
        with torch.no_grad():
            model.wte.weight[model.type_rows] = rows
    return model.train(), tokenizer


def check_size(config: Config, found: GPT2Config) -> None:
    """Raise UserError if `[model]` wants another size than the loaded model's; 0 stands for it."""
    for key, model_key in (
        ("n_layer", "n_layer"),
        ("n_head", "n_head"),
        ("n_embd", "n_embd"),
        ("n_ctx", "n_positions"),
    ):
        wanted = getattr(config.model, key)
        size = getattr(found, model_key)
        fits = wanted in (0, size)
        if key == "n_ctx":
            fits = wanted <= size  # a shorter context is fine
        if not fits:
            raise UserError(
                f"[model] {key} is {wanted}, {config.init_from} has {model_key} {size}; "
                f"leave {key} out"
            )
