"""The loop: LM and ChatLM, one process or many. `Run.train` is the algorithm; `task` only chooses the batches.

A step is a pure function of (config, step): the batches are, and dropout is seeded from (seed, step, micro-batch). The
loss of a step is the sum over its target tokens divided by their number, over all micro-batches of all processes; DDP
averages gradients, so the sums are multiplied by the number of processes. Run it as `python -m gptchat.train --config
FILE [section.key=value ...]` or, with several processes, `torchrun --nproc-per-node N -m gptchat.train ...`. The same
command goes on with a run that was stopped or killed.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gptchat.config import Config, load_config
from gptchat.console import UserError, cli
from gptchat.data.batches import Batch, Batches, prefetch
from gptchat.data.dialogue import Turn
from gptchat.data.shards import open_shards
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import atomic_write
from gptchat.inference.generate import TextGenerator
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2, GPT2Config
from gptchat.runtime import tune_memory
from gptchat.training import checkpoint
from gptchat.training.distributed import World, wrap_model
from gptchat.training.metrics import autocast, metrics, sum_losses
from gptchat.training.monitor import Monitor
from gptchat.training.optim import clip_gradients, lr_scale, make_optimizers, set_learning_rate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """One training run: what it reads, how far it has come, and what it writes under its folder."""

    def __init__(self, config: Config, world: World):
        self.config, self.world, self.folder = config, world, Path(config.run)
        self.lock = checkpoint.lock(self.folder) if world.rank == 0 else None
        self.checkpoint_path, self.model_dir = (
            self.folder / "checkpoint.safetensors",
            self.folder / "model",
        )
        if world.rank == 0 and (n := config.train.gradient_accumulation_steps) < world.size:
            print(
                f"train.gradient_accumulation_steps {n} leaves some of {world.size} processes idle",
                file=sys.stderr,
            )
        self.model, self.tokenizer = start_model(config)
        self.batches, self.valid = self.make_batches("train"), self.make_batches("valid")
        self.total = config.train.num_steps or math.ceil(
            config.train.num_epochs
            * self.batches.steps_per_epoch(config.train.gradient_accumulation_steps)
        )
        self.model.to(world.device)
        self.optimizers = make_optimizers(self.model, config.train)
        self.scaler = torch.amp.GradScaler(
            world.device.type, enabled=config.train.precision == "fp16"
        )
        text = {
            "tokenizer": self.tokenizer.hash,
            "train_tokens": self.batches.shards.n_tokens,
            "init": self.model.ln_f.weight[:4].tolist() if config.init_from else [],
        }  # any training changes these
        self.resolved = json.loads(json.dumps(dataclasses.asdict(config) | {"text": text}))
        self.progressed = checkpoint.TrainState()
        if self.checkpoint_path.exists():
            self.progressed = checkpoint.load_checkpoint(
                self.checkpoint_path, self.model, self.optimizers, self.resolved
            )
            self.scaler.load_state_dict(self.progressed.scaler)
        self.loss_sum = torch.tensor(
            self.progressed.loss_sum if world.rank == 0 else 0.0, dtype=torch.float64
        )
        self.trained = wrap_model(self.model, config.train, world)
        self.signalled, self.stopped = False, False

    def make_batches(self, split: str) -> Batches:
        return Batches(
            open_shards(self.config, split, self.tokenizer),
            self.tokenizer,
            n_ctx=self.config.model.n_ctx or self.model.config.n_positions,
            batch_size=self.config.train.batch_size,
            seed=self.config.train.seed,
            targets=self.config.data.targets,
            packed=self.config.data.packed,
        )

    @property
    def done(self) -> bool:
        patience = self.config.train.patience
        return (
            self.progressed.step >= self.total or 0 < patience <= self.progressed.stale_evaluations
        )

    def train(self) -> None:
        """Train from where the run stands until it is done or told to stop."""
        config, world, at = self.config.train, self.world, self.progressed
        indices = range(
            world.rank,
            -(-config.gradient_accumulation_steps // world.size) * world.size,
            world.size,
        )
        with (
            self.logging() as log,
            prefetch(
                self.batches, at.step, self.total, config.gradient_accumulation_steps, indices
            ) as steps,
        ):
            for micro_batches in steps:
                set_learning_rate(self.optimizers, lr_scale(at.step, self.total, config))
                grad_norm = self.step(micro_batches)
                at.step += 1
                log.count(micro_batches)
                last = at.step == self.total
                if last or at.step % config.log_interval == 0:
                    log.training(
                        self.mean_loss(), self.optimizers[0].param_groups[0]["lr"], float(grad_norm)
                    )
                if last or at.step % config.eval_interval == 0:
                    self.evaluate(log)
                    self.save(log)
                if self.done or self.stopped:
                    break
            if self.stopped and not self.done:
                self.save(log)
                log.line(
                    f"stopped at step {at.step} of {self.total}; the same command goes on from here"
                )

    def step(self, micro_batches: list[Batch]) -> Tensor:
        """One optimizer step. Returns the gradient norm before clipping, a scalar on the device."""
        config, world = self.config.train, self.world
        n_targets, stopped = world.sum(
            sum(batch.n_targets for batch in micro_batches), float(self.signalled)
        )
        self.stopped = stopped > 0
        self.progressed.n_targets += int(n_targets)
        for number, batch in enumerate(micro_batches):
            torch.manual_seed(
                hash((config.seed, self.progressed.step, world.rank + number * world.size))
            )
            waits = number < len(micro_batches) - 1 and isinstance(
                self.trained, DistributedDataParallel
            )
            with self.trained.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                loss_sum = self.loss(batch)
                self.scaler.scale(loss_sum * (world.size / max(1, n_targets))).backward()
            self.loss_sum = self.loss_sum + loss_sum.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = clip_gradients(self.model, config.max_grad_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        return grad_norm

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the cross-entropies of a micro-batch's targets, a scalar on the device."""
        with autocast(self.world.device, self.config.train.precision):
            return self.trained(**batch.inputs(self.world.device))

    def mean_loss(self) -> float:
        """The mean loss per target since it was last asked for, over all processes."""
        (loss_sum,) = self.world.sum(float(self.loss_sum))
        mean = loss_sum / max(1, self.progressed.n_targets)
        self.loss_sum, self.progressed.n_targets = torch.zeros_like(self.loss_sum), 0
        return mean

    def evaluate(self, log: Monitor) -> None:
        """Measure the held-out loss on all processes; keep the model if it is the best so far."""
        at, world = self.progressed, self.world
        gc.collect()
        own = itertools.islice(self.valid.evaluation(), world.rank, None, world.size)
        loss_sum, n_targets = world.sum(
            *sum_losses(self.model, own, world.device, self.config.train.precision)
        )
        loss = loss_sum / max(1, n_targets)
        best = loss < at.best_loss
        at.stale_evaluations = 0 if best else at.stale_evaluations + 1
        if best:
            at.best_loss = loss
            if world.rank == 0:
                pretrained.save_weights(self.model_dir, self.model)
        log.evaluation(metrics(loss_sum, int(n_targets), self.valid.n_bytes), best, self.samples())

    def samples(self, n: int = 3, prompt: int = 16) -> list[str]:
        """What the model answers in `n` held-out dialogues, or how it goes on with the beginning of held-out texts."""
        if self.world.rank > 0:
            return []
        shards, task = self.valid.shards, self.config.task
        prompts: list[list[Turn]] = []
        for number in range(0, shards.documents, -(-shards.documents // n)):
            start = int(shards.starts[number])
            prompts.append(
                shards.dialogue(number)[:-1]
                if task == "chatlm"
                else [(0, shards.tokens(start, min(start + prompt, shards.n_tokens)).tolist())]
            )
        told = [" / ".join(self.tokenizer.decode(ids) for _, ids in turns) for turns in prompts]
        texts = TextGenerator(self.model, self.tokenizer, task).sample_answers(prompts)
        return [f"{asked} -> {text}" for asked, text in zip(told, texts, strict=True)]

    def logging(self) -> Monitor:
        """Write down what the run is, and begin to tell of it."""
        if self.world.rank == 0:
            pretrained.save_static(
                self.model_dir, self.model.config, self.tokenizer, self.config.task
            )
            with atomic_write(self.folder / "config.json") as temporary:
                temporary.write_text(json.dumps(self.resolved, indent=2) + "\n")
        return Monitor(
            self.folder,
            self.world,
            self.model.config,
            DTYPES[self.config.train.precision],
            self.config.task,
            self.progressed.step,
            self.total,
            self.progressed.log_bytes,
        )

    def signal(self, number: int, frame: FrameType | None) -> None:
        """Finish the step, save and stop; a second signal ends the process at once."""
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)

    def save(self, log: Monitor) -> None:
        """Write the checkpoint from which the same command goes on."""
        (self.progressed.loss_sum,) = self.world.sum(float(self.loss_sum))
        self.progressed.scaler, self.progressed.log_bytes = self.scaler.state_dict(), log.size()
        if self.world.rank == 0:
            checkpoint.save_checkpoint(
                self.checkpoint_path, self.model, self.optimizers, self.progressed, self.resolved
            )


def start_model(config: Config) -> tuple[GPT2, Tokenizer]:
    """A new model of the config's size, or the one that `init_from` names with what a chat needs appended."""
    torch.manual_seed(config.train.seed)
    tokenizer, size = tokenizer_for(config), config.model
    if not config.init_from:
        return GPT2(
            GPT2Config(
                vocab_size=tokenizer.vocab_size,
                n_positions=size.n_ctx,
                n_embd=size.n_embd,
                n_layer=size.n_layer,
                n_head=size.n_head,
                embd_pdrop=size.dropout,
                attn_pdrop=size.dropout,
                resid_pdrop=size.dropout,
            )
        ), tokenizer
    model, tokenizer, task = pretrained.load_model(config.init_from, dropout=size.dropout)
    for ours, theirs in (
        ("n_layer", "n_layer"),
        ("n_head", "n_head"),
        ("n_embd", "n_embd"),
        ("n_ctx", "n_positions"),
    ):
        wanted, found = getattr(size, ours), getattr(model.config, theirs)
        if wanted > found if ours == "n_ctx" else wanted not in (0, found):
            raise UserError(
                f"[model] {ours} is {wanted}, {config.init_from} has {theirs} {found}; leave {ours} out"
            )
    added = pretrained.adapt(model, tokenizer, config.train.seed)
    if (
        config.task == "chatlm"
        and task == "lm"
        and "type 0" not in added
        and not config.train.keep_type_rows
    ):
        with torch.no_grad():
            model.wte.weight[model.type_rows] = (
                torch.randn(2, model.config.n_embd) * model.config.initializer_range
            )
    return model.train(), tokenizer


def train(config: Config) -> Run:
    """Train, or go on, until done or told to stop by SIGINT or SIGTERM."""
    world = World(config.train.device)
    run = Run(config, world)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.signal)
    tune_memory()
    gc.disable()  # its pauses cost more than the little that a step leaves; `evaluate` collects that
    if run.done and world.rank == 0:
        print(
            f"{config.run}: finished at step {run.progressed.step} of {run.total}, best held-out loss "
            f"{run.progressed.best_loss:.4f}; train more by raising num_steps, or remove the folder to start anew"
        )
    if not run.done:
        run.train()
    world.close()
    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gptchat.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    run = train(load_config(arguments.config, arguments.overrides))
    if run.stopped and not run.done:
        sys.exit(130)


if __name__ == "__main__":
    cli(main)
