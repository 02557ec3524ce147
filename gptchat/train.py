"""Train an LM or a ChatLM, in one process or several. `Run.train` is the algorithm.

    python -m gptchat.train --config FILE [section.key=value ...]
    torchrun --nproc-per-node N -m gptchat.train --config FILE [section.key=value ...]

The same command resumes a run that was stopped or killed. `task` only chooses the data: the loop is
the same for both.

Invariants:
- A step is a pure function of the weights, the optimizer state, fp16's loss scale and (config, step
  number): its batches come from the step number, and dropout is seeded from (seed, step,
  micro-batch). No other state enters it, so resuming is exact.
- The loss of a step is the sum over its target tokens divided by their number, over all
  micro-batches of all processes: every target weighs the same, wherever it stands.
- The micro-batch is the fixed unit of work. Processes divide a step's micro-batches among
  themselves, so a run may go on with another number of processes and see the same batches.
- `<run>/model/` is the best model so far, by held-out loss; `<run>/checkpoint.safetensors` is where
  the run stands.
"""

import contextlib
import gc
import itertools
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# How often OpenMP's threads look for work before they sleep. With its own 300,000, a step beside
# another program took five times as long. It is read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gptchat.config import Config, load_run_config
from gptchat.console import CommandParser, UserError, cli
from gptchat.data.batches import Batch, Batches, prefetch
from gptchat.data.keyed_draw import draw_key
from gptchat.data.shards import open_sources
from gptchat.files import remove_temporary_files
from gptchat.inference.generate import TextGenerator
from gptchat.model import pretrained
from gptchat.runtime import (
    dump_threads_on_signal,
    handle_stop_signals,
    on_stop_signals,
    tune_memory,
)
from gptchat.training import checkpoint, start
from gptchat.training.checkpoint import TrainState
from gptchat.training.distributed import World, lost_processes_in_one_line, wrap_model
from gptchat.training.health import HealthCheck
from gptchat.training.metrics import PRECISIONS, autocast, metrics, sum_losses
from gptchat.training.monitor import Monitor
from gptchat.training.optim import (
    JointOptimizer,
    clip_gradients,
    lr_scale,
    make_optimizers,
    set_learning_rate,
)
from gptchat.training.saved_config import resolve_config, save_config

N_SAMPLES = 3  # texts that an evaluation lets the model write
SAMPLE_PROMPT = 16  # tokens of a held-out text that an LM continues in them


class Run:
    """One training run: its model and data, how far it has come, what it writes to its folder."""

    def __init__(self, config: Config, world: World):
        """Begin a run, or resume the one in the config's folder.

        Raises UserError where data, model or checkpoint do not fit the config.
        """
        self.config = config = start.choose_precision(config, world)
        self.world = world
        self.folder = Path(config.run)
        self.model_dir = self.folder / "model"
        self.checkpoint_path = self.folder / "checkpoint.safetensors"
        self.lock = None
        if world.rank == 0:
            self.lock = checkpoint.lock(self.folder)
            remove_temporary_files(self.folder)
            remove_temporary_files(self.model_dir)
        self.signalled = False  # this process was told to stop
        self.stopped = False  # some process was told to stop; all learn it in the same step

        self.model, self.tokenizer = start.start_model(config)
        self.train_batches = self._open_batches("train")
        self.valid_batches = self._open_batches("valid")
        self.total_steps = self._count_steps()
        self.model.to(world.device)
        self.optimizers = make_optimizers(self.model, config.train)
        self.stepper = self.optimizers[0]  # makes the step of all optimizers
        if len(self.optimizers) > 1:
            self.stepper = JointOptimizer(self.optimizers)
        is_fp16 = config.train.precision == "fp16"
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=is_fp16)
        self.resolved_config = self._resolve_config()
        self.state = TrainState()
        if self.checkpoint_path.exists():
            self._load_checkpoint()
        world.require_same_step(self.state.step, config.run)
        # This process's share of state.loss_sum, summed over all processes when it is needed.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
        if world.rank == 0:
            self.loss_sum += self.state.loss_sum
        self.health = HealthCheck(
            config.run, world, self.state.step, skips_overflows=self.scaler.is_enabled()
        )
        varying = self.train_batches.varying_dimensions
        self.wrapped_model = wrap_model(self.model, config.train, world, varying)

    def _open_batches(self, split: str) -> Batches:
        config = self.config
        targets = config.data.targets if split == "train" else config.data.held_out_targets
        return Batches(
            open_sources(config, split, self.tokenizer),
            self.tokenizer,
            n_ctx=config.model.n_ctx or self.model.config.n_positions,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            targets=targets,
            packed=config.data.packed,
            weights=config.data.weights,
        )

    def _count_steps(self) -> int:
        config = self.config.train
        if config.num_steps > 0:
            return config.num_steps
        per_epoch = self.train_batches.steps_per_epoch(config.gradient_accumulation_steps)
        return math.ceil(config.num_epochs * per_epoch)

    def _resolve_config(self) -> dict[str, Any]:
        """The config and what its files hold, which must be the same when the run is resumed."""
        text = {
            "tokenizer": self.tokenizer.hash,
            "train": self.train_batches.digest,
            "valid": self.valid_batches.digest,
            "init": start.fingerprint(self.config, self.model),
        }
        return resolve_config(self.config, text)

    def _load_checkpoint(self) -> None:
        self.state, changes = checkpoint.load_checkpoint(
            self.checkpoint_path, self.model, self.optimizers, self.resolved_config
        )
        if self.state.step > self.total_steps:
            raise UserError(
                f"{self.checkpoint_path}: stands at step {self.state.step}; the config wants only "
                f"{self.total_steps} steps; raise train.num_steps or train.num_epochs"
            )
        if self.scaler.is_enabled() and self.state.scaler:  # else the run was not in fp16 before
            self.scaler.load_state_dict(self.state.scaler)
        if self.world.rank == 0 and changes:
            print(f"{self.config.run}: goes on; {'; '.join(changes)}", file=sys.stderr)

    @property
    def done(self) -> bool:
        """Whether all steps are made, or `patience` evaluations in a row were no better."""
        patience = self.config.train.patience
        out_of_patience = 0 < patience <= self.state.stale_evaluations
        return out_of_patience or self.state.step >= self.total_steps

    def train(self) -> None:
        """Train from where the run stands until it is done, or until a signal stops it."""
        config = self.config.train
        state = self.state
        with self.start_monitor() as monitor, self.prefetch_steps() as steps:
            for micro_batches in steps:
                set_learning_rate(self.optimizers, lr_scale(state.step, self.total_steps, config))
                grad_norm = self.step(micro_batches)
                state.step += 1
                self.health.count_step(grad_norm)
                monitor.count_step(micro_batches, state.n_tokens)
                is_last = state.step == self.total_steps
                if is_last or state.step % config.log_interval == 0:
                    learning_rate = self.optimizers[0].param_groups[0]["lr"]
                    monitor.report_training(self.take_mean_loss(), learning_rate, float(grad_norm))
                if is_last or state.step % config.eval_interval == 0:
                    self.evaluate(monitor)
                    self.save(monitor)
                if self.done or self.stopped:
                    break
            if self.stopped and not self.done:
                self.save(monitor)
                monitor.print_line(
                    f"stopped at step {state.step} of {self.total_steps}; "
                    "the same command goes on from here"
                )

    @property
    def micro_batch_indices(self) -> range:
        """Which of a step's micro-batches this process takes: every `world.size`-th from its rank.

        Every process takes the same number, as DDP requires; indices past the last micro-batch
        stand for empty ones.
        """
        per_process = math.ceil(self.config.train.gradient_accumulation_steps / self.world.size)
        return range(self.world.rank, per_process * self.world.size, self.world.size)

    def prefetch_steps(self) -> contextlib.AbstractContextManager[Iterator[list[Batch]]]:
        """The micro-batches of this process, step by step, from where the run stands."""
        return prefetch(
            self.train_batches,
            self.state.step,
            self.total_steps,
            self.config.train.gradient_accumulation_steps,
            self.micro_batch_indices,
        )

    def step(self, micro_batches: list[Batch]) -> Tensor:
        """One optimizer step on this process's micro-batches.

        Returns the gradient norm before clipping, a scalar tensor on the device.
        """
        own_targets = sum(batch.n_targets for batch in micro_batches)
        own_tokens = sum(batch.n_tokens for batch in micro_batches)
        own_counts = (own_targets, own_tokens, float(self.signalled))
        n_targets, n_tokens, n_signalled = self.world.sum(*own_counts)
        self.stopped = n_signalled > 0
        self.state.n_targets += int(n_targets)
        self.state.n_tokens += int(n_tokens)
        # DDP averages gradients over the processes; their number makes a sum of the average.
        loss_scale = self.world.size / max(1, n_targets)
        for index, batch in zip(self.micro_batch_indices, micro_batches, strict=True):
            self._seed_dropout(index)
            with self._sync_gradients(is_last=index == self.micro_batch_indices[-1]):
                loss_sum = self.loss(batch)
                self.scaler.scale(loss_sum * loss_scale).backward()
            self.loss_sum = self.loss_sum + loss_sum.detach()
        return self._update_weights()

    def _seed_dropout(self, micro_batch: int) -> None:
        torch.manual_seed(draw_key(self.config.train.seed, self.state.step, micro_batch))

    def _sync_gradients(self, is_last: bool) -> contextlib.AbstractContextManager:
        """DDP averages gradients over processes once a step, in the last backward pass."""
        if is_last or not isinstance(self.wrapped_model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.wrapped_model.no_sync()

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the cross-entropies (nats) of a micro-batch's targets, a scalar tensor."""
        with autocast(self.world.device, self.config.train.precision):
            return self.wrapped_model(**batch.inputs(self.world.device))

    def _update_weights(self) -> Tensor:
        """Clip the gradients, use them and clear them. Returns their norm before clipping."""
        self.scaler.unscale_(self.stepper)
        grad_norm = clip_gradients(self.model, self.config.train.max_grad_norm)
        self.scaler.step(self.stepper)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return grad_norm

    def take_mean_loss(self) -> float:
        """The mean loss per target since the last call, over all processes. Begins a new count."""
        state = self.state
        loss_sum = self.health.sum_losses(state.step, self.loss_sum, state.n_targets)
        mean = loss_sum / max(1, state.n_targets)
        self.loss_sum = torch.zeros_like(self.loss_sum)
        state.n_targets = 0
        return mean

    def evaluate(self, monitor: Monitor) -> None:
        """Measure the held-out loss, all processes together; keep the model if it is the best."""
        world = self.world
        gc.collect()
        batches = itertools.islice(self.valid_batches.evaluation(), world.rank, None, world.size)
        own_loss_sum, own_targets = sum_losses(
            self.model, batches, world.device, self.config.train.precision
        )
        loss_sum, n_targets = world.sum(own_loss_sum, own_targets)
        loss = loss_sum / max(1, n_targets)
        self.health.check(self.state.step, {"held-out loss": loss})
        is_best = loss < self.state.best_loss
        if is_best:
            self.state.best_loss = loss
            self.state.stale_evaluations = 0
            if world.rank == 0:
                pretrained.save_weights(self.model_dir, self.model)
        else:
            self.state.stale_evaluations += 1
        figures = metrics(loss_sum, int(n_targets), self.valid_batches.n_bytes)
        monitor.report_evaluation(figures, is_best, self.samples())

    def samples(self) -> list[str]:
        """Lines "prompt -> text": held-out dialogues that the model answers, or texts it continues.

        Empty on other ranks than 0, which report nothing.
        """
        if self.world.rank > 0:
            return []
        shards = self.valid_batches.sources[0]
        n_documents = shards.documents
        stride = math.ceil(n_documents / N_SAMPLES)
        prompts = [shards.prompt(number, SAMPLE_PROMPT) for number in range(0, n_documents, stride)]
        generator = TextGenerator(self.model, self.tokenizer, self.config.task)
        lines = []
        for turns, answer in zip(prompts, generator.sample_answers(prompts), strict=True):
            prompt = " / ".join(self.tokenizer.decode(ids) for _, ids in turns)
            lines.append(f"{prompt} -> {answer}")
        return lines

    def start_monitor(self) -> Monitor:
        """Write what does not change during the run, and begin to report."""
        if self.world.rank == 0:
            n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
            defaults = pretrained.suitable_defaults(
                self.config.task, n_parameters, self.config.data.targets
            )
            pretrained.save_static(
                self.model_dir, self.model.config, self.tokenizer, self.config.task, defaults
            )
            save_config(self.folder, self.resolved_config)
        return Monitor(
            self.folder,
            self.world,
            self.model.config,
            self.resolved_config,
            dtype=PRECISIONS[self.config.train.precision],
            step=self.state.step,
            total_steps=self.total_steps,
            log_bytes=self.state.log_bytes,
        )

    def save(self, monitor: Monitor) -> None:
        """Write the checkpoint from which the same command goes on.

        Raises UserError where it cannot be written, RunFailed where its numbers are not finite.
        """
        state = self.state
        state.loss_sum = self.health.sum_losses(state.step, self.loss_sum, state.n_targets)
        self.health.check_weights(state.step, self.model)
        state.scaler = self.scaler.state_dict()
        state.log_bytes = monitor.log_size()
        if self.world.rank == 0:
            checkpoint.save_checkpoint(
                self.checkpoint_path, self.model, self.optimizers, state, self.resolved_config
            )
        self.health.saved_step = state.step

    def stop(self) -> None:
        """Have all processes finish the step, save and end. Any thread may call it."""
        self.signalled = True


def train(config: Config) -> Run:
    """Begin a run or resume it, and train until it is done or a signal stops it."""
    world = World(config.train.device)
    accumulation = config.train.gradient_accumulation_steps
    if world.rank == 0 and accumulation < world.size:
        print(
            f"train.gradient_accumulation_steps {accumulation} leaves some of {world.size} "
            "processes idle",
            file=sys.stderr,
        )
    with lost_processes_in_one_line(world):
        run = Run(config, world)
    dump_threads_on_signal()
    on_stop_signals(run.stop)
    tune_memory()
    gc.disable()  # its pauses cost more than the garbage of a step, which `Run.evaluate` collects
    if not run.done:
        with lost_processes_in_one_line(world):
            run.train()
    elif world.rank == 0:
        print(
            f"{config.run}: finished at step {run.state.step} of {run.total_steps}, "
            f"best held-out loss {run.state.best_loss:.4f}; "
            "train more by raising num_steps, or remove the folder to start anew"
        )
    world.close()
    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "train",
        "Train an LM or a ChatLM. The same command goes on with a run that was stopped or killed.",
        "gptchat train --config configs/lm.toml train.learning_rate=1e-3 run=out/try",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="see configs/README.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="used instead of the config's"
    )
    arguments = parser.parse_intermixed_args(argv)
    run = train(load_run_config(arguments.config, arguments.overrides))
    if run.stopped and not run.done:
        handle_stop_signals(signal.SIG_IGN)  # what is left of a burst leaves the exit status alone
        sys.exit(130)


if __name__ == "__main__":
    cli(main)
