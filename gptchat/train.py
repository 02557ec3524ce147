"""Train an LM or a ChatLM, in one process or several. `train` is the algorithm.

    python -m gptchat.train --config FILE [section.key=value ...]
    torchrun --nproc-per-node N -m gptchat.train --config FILE [section.key=value ...]

Vocabulary and shards that are missing or out of date are made first. The same command resumes a run
that was stopped or killed. `task` only chooses the data.

- A step depends on the weights, the optimizer state, fp16's loss scale, the config and the step
  number only: its batches come from the step number, and dropout is seeded from (seed, step,
  micro-batch). So resuming is exact.
- The loss of a step is the sum over its target tokens divided by their number, over all
  micro-batches of all processes: every target weighs the same.
- Processes share a step's micro-batches, so a run may go on with another number of processes.
- `<run>/model/` is the best model so far, by held-out loss; a resumed run goes on from
  `<run>/checkpoint.safetensors`.
"""

import gc
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

# How often OpenMP's threads look for work before they sleep; read when torch is imported. With the
# default of 300,000, a step beside another program took five times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gptchat.config import Config, load_run_config
from gptchat.console import CommandParser, cli
from gptchat.data import shards
from gptchat.data.batches import Batch, prefetch
from gptchat.data.keyed_draw import draw_key
from gptchat.files import atomic_write
from gptchat.model import pretrained
from gptchat.runtime import handle_stop_signals, on_stop_signals, tune_memory
from gptchat.training import checkpoint
from gptchat.training.distributed import World, lost_processes_in_one_line
from gptchat.training.metrics import autocast, metrics, sum_losses
from gptchat.training.monitor import Monitor, require_finite
from gptchat.training.optim import clip_gradients, lr_scale, set_learning_rate
from gptchat.training.start import Run, start


def train(run: Run) -> None:
    """Train until the run is done, or a signal stops it."""
    config, state = run.config.train, run.state
    write_static_files(run)
    with Monitor(run) as monitor, prefetch_steps(run) as steps:
        if run.best_is_missing:
            monitor.print_line(f"{run.model_dir}: the best model is gone; this one takes its place")
            state.best_loss = math.inf
            evaluate(run, monitor)
            save(run)
        for micro_batches in steps:
            set_learning_rate(run.optimizer, lr_scale(state.step, run.total_steps, config))
            loss_sum, grad_norm = train_step(run, micro_batches)
            state.step += 1
            monitor.count_step(micro_batches, loss_sum, grad_norm)
            is_evaluated = state.step % config.eval_interval == 0 or state.step == run.total_steps
            is_saved = is_evaluated or run.stopped
            if is_saved or state.step % config.log_interval == 0:
                monitor.report_training(grad_norm)
            if is_evaluated:
                evaluate(run, monitor)
            if is_saved:
                save(run)
            if run.stopped or run.done:
                break
        if run.stopped and not run.done:
            monitor.print_line(
                f"stopped at step {state.step} of {run.total_steps}; "
                "the same command goes on from here"
            )


def write_static_files(run: Run) -> None:
    """Write what does not change during the run: the configs and the tokenizer."""
    if run.world.rank > 0:
        return
    task = run.config.task
    n_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    learns_both = run.config.data.learns_both_speakers
    defaults = pretrained.suitable_defaults(task, n_parameters, learns_both)
    pretrained.save_static(run.model_dir, run.model.config, run.tokenizer, task, defaults)
    with atomic_write(run.folder / "config.json") as temporary:
        temporary.write_text(json.dumps(run.saved_config, indent=2) + "\n")


def micro_batch_indices(run: Run) -> range:
    """The micro-batches of a step that this process takes, as many as the others, as DDP requires.

    Those past the last micro-batch are empty.
    """
    world = run.world
    per_process = math.ceil(run.config.train.gradient_accumulation_steps / world.size)
    return range(world.rank, per_process * world.size, world.size)


def prefetch_steps(run: Run) -> AbstractContextManager[Iterator[list[Batch]]]:
    """The micro-batches of this process, step by step."""
    per_step = run.config.train.gradient_accumulation_steps
    steps = (run.state.step, run.total_steps)
    return prefetch(run.train_batches, *steps, per_step, micro_batch_indices(run))


def train_step(run: Run, micro_batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """One optimizer step on this process's micro-batches.

    Returns the sum of their losses and the gradient norm before clipping, scalar tensors on the
    device.
    """
    world, state = run.world, run.state
    n_targets, n_tokens, n_signalled = world.sum(
        sum(batch.n_targets for batch in micro_batches),
        sum(batch.n_tokens for batch in micro_batches),
        float(run.signalled),
    )
    run.stopped = n_signalled > 0
    state.n_tokens += int(n_tokens)
    # DDP averages gradients over the processes; a sum is wanted.
    loss_scale = world.size / max(1, n_targets)
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    indices = micro_batch_indices(run)
    for index, batch in zip(indices, micro_batches, strict=True):
        torch.manual_seed(draw_key(run.config.train.seed, state.step, index))  # for dropout
        if isinstance(run.training_model, DistributedDataParallel):  # averages once a step
            run.training_model.require_backward_grad_sync = index == indices[-1]
        with autocast(world.device, run.config.train.precision):
            loss_sum = run.training_model(**batch.inputs(world.device))  # nats
        run.scaler.scale(loss_sum * loss_scale).backward()
        total += loss_sum.detach()
    return total, update_weights(run)


def update_weights(run: Run) -> Tensor:
    """Clip the gradients, use them and clear them. Returns their norm before clipping."""
    run.scaler.unscale_(run.optimizer)
    grad_norm = clip_gradients(run.model, run.config.train.max_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return grad_norm


def evaluate(run: Run, monitor: Monitor) -> None:
    """Measure the held-out loss; keep the model if it is the best."""
    world, state = run.world, run.state
    gc.collect()
    batches = itertools.islice(run.valid_batches.evaluation(), world.rank, None, world.size)
    sums = sum_losses(run.model, batches, world.device, run.config.train.precision)
    loss_sum, n_targets = world.sum(*sums)
    loss = loss_sum / max(1, n_targets)
    require_finite(world, run.folder, state.step, {"held-out loss": loss})
    is_best = loss < state.best_loss
    state.stale_evaluations += 1
    if is_best:
        state.best_loss = loss
        state.stale_evaluations = 0
        run.best_is_missing = False
        if world.rank == 0:
            pretrained.save_weights(run.model_dir, run.model)
            (run.model_dir / "README.md").unlink(missing_ok=True)  # `evaluate`'s, of another model
    figures = metrics(loss_sum, int(n_targets), run.valid_batches.n_bytes)
    monitor.report_evaluation(figures, is_best)


def save(run: Run) -> None:
    """Write the checkpoint from which the same command goes on.

    Raises UserError if it cannot be written, RunFailed if a weight is not finite.
    """
    norm = float(torch.nn.utils.get_total_norm(run.model.parameters()))
    require_finite(run.world, run.folder, run.state.step, {"norm of the weights": norm})
    run.state.scaler = run.scaler.state_dict()
    if run.world.rank == 0:
        checkpoint.save(run.folder, run.model, run.optimizer, run.state, run.saved_config)


def describe_end(run: Run) -> str:
    """Why a run that is done has ended, and what trains it further."""
    config, state = run.config.train, run.state
    reason, advice = "", "num_steps" if config.num_steps else "num_epochs"
    if run.out_of_patience:
        reason = f" by train.patience: evaluations without a better loss: {state.stale_evaluations}"
        advice = "patience"
    return (
        f"{run.config.run}: finished at step {state.step} of {run.total_steps}{reason}, "
        f"best held-out loss {state.best_loss:.4f}; "
        f"train more by raising train.{advice}, or remove the folder to start anew"
    )


def train_config(config: Config) -> Run:
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
        world.first(lambda: shards.prepare(config))
        run = start(config, world)
        on_stop_signals(run.stop)
        tune_memory()
        gc.disable()  # its pauses cost more than a step's garbage; `evaluate` collects it
        if not run.done:
            train(run)
    if run.done and world.rank == 0:
        print(describe_end(run))
    world.close()
    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "train",
        "Train an LM or a ChatLM. The same command goes on with a run that was stopped or killed.",
        "gptchat train --config configs/lm.toml train.learning_rate=1e-3 run=out/try",
    )
    arguments = parser.parse_config_and_overrides(argv)
    run = train_config(load_run_config(arguments.config, arguments.overrides))
    if run.stopped and not run.done:
        handle_stop_signals(signal.SIG_IGN)  # the rest of a burst must not change the exit status
        sys.exit(130)


if __name__ == "__main__":
    cli(main)
