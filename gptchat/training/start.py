"""The start of a training run: `start` gives a `Run` that is complete, new or resumed.

Everything random here is drawn from the config's seed, so the same config starts from the same
weights.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from gptchat.artifacts import lock_folder
from gptchat.config import Config
from gptchat.console import UserError
from gptchat.data.batches import Batches
from gptchat.data.shards import open_sources
from gptchat.data.tokenizer import Tokenizer, start_directory, tokenizer_for
from gptchat.files import remove_temporary_files
from gptchat.model import pretrained
from gptchat.model.convert import adapt
from gptchat.model.devices import multiplies_bfloat16
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.training import checkpoint
from gptchat.training.checkpoint import Checkpoint, TrainState
from gptchat.training.distributed import World, wrap_model
from gptchat.training.metrics import resolve_precision
from gptchat.training.optim import Optimizers, make_optimizers


@dataclass
class Run:
    """A training run: what it trains, on what, how, and how far it has come."""

    config: Config  # its precision is one of PRECISIONS
    saved_config: dict[str, Any]  # the config and digests of the data, as a checkpoint keeps them
    world: World
    lock: IO[str] | None  # holds the run's folder, on rank 0
    model: GPT2
    training_model: torch.nn.Module  # calls `model`, compiled and through DDP where that is wanted
    tokenizer: Tokenizer
    train_batches: Batches
    valid_batches: Batches
    total_steps: int
    optimizer: Optimizers
    scaler: torch.amp.GradScaler
    state: TrainState
    best_is_missing: bool  # the checkpoint's best model is not in its folder any more
    signalled: bool = False  # this process was told to stop
    stopped: bool = False  # some process was told to stop; all know it after the same step

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @property
    def model_dir(self) -> Path:
        return self.folder / "model"

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before them."""
        return 0 < self.config.train.patience <= self.state.stale_evaluations

    @property
    def done(self) -> bool:
        ended = self.out_of_patience or self.state.step >= self.total_steps
        return ended and not self.best_is_missing

    def stop(self) -> None:
        """Have all processes finish the step, save and end."""
        self.signalled = True


def start(config: Config, world: World) -> Run:
    """Begin a run, or resume the one in the config's folder.

    Raises UserError where data, model or checkpoint do not fit the config.
    """
    config = choose_precision(config, world)
    folder = Path(config.run)
    lock = None
    if world.rank == 0:
        lock = lock_folder(folder, "another run is training here")
        remove_temporary_files(folder)
        remove_temporary_files(folder / "model")
    saved = checkpoint.read(folder)

    model, tokenizer = start_model(config)
    train_batches = open_batches(config, "train", model, tokenizer)
    valid_batches = open_batches(config, "valid", model, tokenizer)
    digests = {
        "tokenizer": tokenizer.hash,
        "train": train_batches.digest,
        "valid": valid_batches.digest,
        "init": fingerprint(config, model, saved),
    }
    saved_config = checkpoint.resolve_config(config, digests)

    total_steps = count_steps(config, train_batches)
    model.to(world.device)
    optimizer = make_optimizers(model, config.train)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16")
    state = TrainState()
    if saved:
        changes = checkpoint.compare_configs(saved, saved_config)
        if world.rank == 0 and changes:
            print(f"{config.run}: goes on; {'; '.join(changes)}", file=sys.stderr)
        state = checkpoint.restore(saved, model, optimizer)
    check_step(state, total_steps, folder)
    world.require_same_step(state.step, config.run)
    if scaler.is_enabled() and state.scaler:  # else the run was not in fp16 before
        scaler.load_state_dict(state.scaler)
    return Run(
        config=config,
        saved_config=saved_config,
        world=world,
        lock=lock,
        model=model,
        training_model=wrap_model(model, config.train, world, train_batches.varying_dimensions),
        tokenizer=tokenizer,
        train_batches=train_batches,
        valid_batches=valid_batches,
        total_steps=total_steps,
        optimizer=optimizer,
        scaler=scaler,
        state=state,
        best_is_missing=best_is_missing(state, folder, world),
    )


def choose_precision(config: Config, world: World) -> Config:
    """The config with the precision that "auto" means on the device of this run.

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
    """A new model of the config's size, or the one that `init_from` names, and its tokenizer.

    A model of `init_from` gets the special tokens and token types that it lacks. A ChatLM draws the
    type rows of an LM anew, N(0, initializer_range): LM training has seen them only as outputs that
    are never right. Raises UserError if the model is not of the size that the config wants.
    """
    torch.manual_seed(config.train.seed)
    if not config.init_from:
        tokenizer = tokenizer_for(config)
        return GPT2(GPT2Config.of(config.model, tokenizer.vocab_size)), tokenizer
    model, tokenizer, model_task = pretrained.load_model(
        start_directory(config), dropout=config.model.dropout
    )
    check_size(config, model.config)
    appended = adapt(model, tokenizer, config.train.seed)
    was_lm = config.task == "chatlm" and model_task == "lm"
    if was_lm and "type 0" not in appended:
        rows = torch.randn(2, model.config.n_embd) * model.config.initializer_range
        with torch.no_grad():
            model.wte.weight[model.type_rows] = rows
    return model.train(), tokenizer


def fingerprint(config: Config, model: GPT2, saved: Checkpoint | None) -> list[float]:
    """A few weights that identify the model that a run started from; [] for new weights.

    If `init_from` is gone, the checkpoint's own.
    """
    if not config.init_from:
        return []
    if saved and start_directory(config) != config.init_from:
        return saved.config["text"]["init"]
    return model.ln_f.weight[:4].tolist()  # any training changes these


def check_size(config: Config, found: GPT2Config) -> None:
    """Raise UserError if `[model]` wants another size than the loaded model's; 0 fits any."""
    size = config.model
    sizes = {
        "n_layer": (size.n_layer, found.n_layer),
        "n_head": (size.n_head, found.n_head),
        "n_embd": (size.n_embd, found.n_embd),
        "n_ctx": (size.n_ctx, found.n_positions),
    }
    for key, (wanted, has) in sizes.items():
        fits = wanted <= has if key == "n_ctx" else wanted in (0, has)  # a shorter context is fine
        if not fits:
            raise UserError(
                f"[model] {key} is {wanted}, {config.init_from} has {has}; leave {key} out"
            )


def open_batches(config: Config, split: str, model: GPT2, tokenizer: Tokenizer) -> Batches:
    data = config.data
    return Batches(
        open_sources(config, split, tokenizer),
        tokenizer,
        n_ctx=config.model.n_ctx or model.config.n_positions,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        targets=data.targets if split == "train" else data.held_out_targets,
        weights=data.weights,
    )


def count_steps(config: Config, batches: Batches) -> int:
    """The optimizer steps of the whole run."""
    if config.train.num_steps > 0:
        return config.train.num_steps
    per_epoch = batches.steps_per_epoch(config.train.gradient_accumulation_steps)
    return math.ceil(config.train.num_epochs * per_epoch)


def check_step(state: TrainState, total_steps: int, folder: Path) -> None:
    """Raise UserError if the run has made more steps than the config wants."""
    if state.step > total_steps:
        raise UserError(
            f"{folder}: found a checkpoint of step {state.step}; the config wants only "
            f"{total_steps} steps; raise train.num_steps or train.num_epochs"
        )


def best_is_missing(state: TrainState, folder: Path, world: World) -> bool:
    """Whether the checkpoint knows of a best model that is no longer in the run's folder."""
    is_missing = (
        math.isfinite(state.best_loss) and not (folder / "model/model.safetensors").exists()
    )
    return world.sum(float(is_missing and world.rank == 0))[0] > 0
