"""The start of a training run: `start` gives a `Run`, new or resumed.

The same config starts from the same weights: all that is random is drawn from its seed. Whether a
run is done is known from its checkpoint's metadata. A finished run gets no optimizer: a process
needs 1.5 s to make its first one.
"""

import math
import sys
from dataclasses import dataclass, field, replace
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
    tokenizer: Tokenizer
    train_batches: Batches
    valid_batches: Batches
    total_steps: int
    state: TrainState
    best_is_missing: bool  # the checkpoint's best model is not in its folder any more
    signalled: bool = False  # this process was told to stop
    stopped: bool = False  # some process was told to stop; all know it after the same step
    # A finished run has none of these.
    training_model: torch.nn.Module = field(init=False)  # calls `model`, compiled, through DDP
    optimizer: Optimizers = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @property
    def model_dir(self) -> Path:
        return self.folder / "model"

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

    Raises UserError if data, model or checkpoint do not fit the config.
    """
    precision = resolve_precision(config.train.precision, world.device)
    config = replace(config, train=replace(config.train, precision=precision))
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

    state = TrainState()
    if saved:
        state = saved.state
        changes = checkpoint.compare_configs(saved, saved_config)
        if world.rank == 0 and changes:
            print(f"{folder}: goes on; {'; '.join(changes)}", file=sys.stderr)
    if state.step > total_steps:
        raise UserError(
            f"{folder}: found a checkpoint of step {state.step}; the config wants only "
            f"{total_steps} steps; raise train.num_steps or train.num_epochs"
        )
    world.require_same_step(state.step, config.run)
    run = Run(
        config=config,
        saved_config=saved_config,
        world=world,
        lock=lock,
        model=model.to(world.device),
        tokenizer=tokenizer,
        train_batches=train_batches,
        valid_batches=valid_batches,
        total_steps=total_steps,
        state=state,
        best_is_missing=best_is_missing(state, folder, world),
    )
    if not run.done:
        make_ready(run, saved)
    return run


def make_ready(run: Run, saved: Checkpoint | None) -> None:
    """Give a run what it trains with, and the tensors of its checkpoint."""
    config, device = run.config.train, run.world.device
    run.optimizer = make_optimizers(run.model, config)
    run.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    if saved:
        checkpoint.restore(saved.path, run.model, run.optimizer)
        if run.state.scaler:  # it was in fp16 before
            run.scaler.load_state_dict(run.state.scaler)
    varying = run.train_batches.varying_dimensions
    run.training_model = wrap_model(run.model, config, run.world, varying)


def start_model(config: Config) -> tuple[GPT2, Tokenizer]:
    """A new model of the config's size, or the one that `init_from` names, and its tokenizer.

    A model of `init_from` gets the special tokens and token types that it lacks. A ChatLM draws the
    type rows of an LM anew, N(0, initializer_range): to the LM they were outputs that are never
    right. Raises UserError for a model of another size than the config's.
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
    """Four weights that identify the model in `init_from`; [] without one.

    If that model is gone, they are the checkpoint's.
    """
    if not config.init_from:
        return []
    if saved and start_directory(config) != config.init_from:
        return saved.config["text"]["init"]
    return model.ln_f.weight[:4].tolist()


def check_size(config: Config, found: GPT2Config) -> None:
    """Raise UserError if `[model]` does not fit the loaded model; 0 and a shorter context do."""
    wanted = config.model
    sizes = {
        "n_layer": (wanted.n_layer or found.n_layer, found.n_layer),
        "n_head": (wanted.n_head or found.n_head, found.n_head),
        "n_embd": (wanted.n_embd or found.n_embd, found.n_embd),
        "n_ctx": (max(wanted.n_ctx, found.n_positions), found.n_positions),
    }
    for key, (size, has) in sizes.items():
        if size != has:
            raise UserError(
                f"[model] {key} is {size}, {config.init_from} has {has}; leave {key} out"
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
    if config.train.num_steps > 0:
        return config.train.num_steps
    per_epoch = batches.steps_per_epoch(config.train.gradient_accumulation_steps)
    return math.ceil(config.train.num_epochs * per_epoch)


def best_is_missing(state: TrainState, folder: Path, world: World) -> bool:
    """Whether the run's best model is no longer in its folder; all processes agree."""
    is_missing = state.best_loss < math.inf and not (folder / "model/model.safetensors").exists()
    return world.sum(float(is_missing))[0] > 0
