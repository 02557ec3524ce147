"""What a training run reports: progress in the terminal, TensorBoard, the model card.

Only rank 0 writes; the figures are those of all processes. Nothing that only reports ends a run: if
a report cannot be written, one line says so and the run goes on. What does end a run is a loss or a
gradient that is not a finite number (`require_finite`): it is neither trained on nor saved.
"""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import hparams, scalar, text

from gptchat.console import Progress, RunFailed, UserError
from gptchat.data.batches import Batch
from gptchat.model.devices import multiplies_bfloat16
from gptchat.model.gpt2 import GPT2Config
from gptchat.training import model_card
from gptchat.training.checkpoint import flatten
from gptchat.training.distributed import World
from gptchat.training.metrics import PRECISIONS, Metrics
from gptchat.training.start import Run

# What TensorBoard's table of runs shows beside their settings.
COMPARED = ("valid/loss", "valid/bits_per_byte", "train/loss", "train/tokens_per_second")


def step_flops(config: GPT2Config, n_tokens: int, n_targets: int, row_length: int) -> float:
    """Floating-point operations of forward and backward (Chowdhery et al. 2022, appendix B).

    6 for each weight and token (for the head, each target), and attention over rows of `row_length`
    positions.
    """
    inner = config.n_inner or 4 * config.n_embd
    block = 4 * config.n_embd**2 + 2 * config.n_embd * inner
    attention = 12 * config.n_layer * config.n_embd * row_length
    head = config.vocab_size * config.n_embd
    return n_tokens * (6 * config.n_layer * block + attention) + 6 * n_targets * head


def matmul_peak(
    device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2
) -> float:
    """The measured peak of a device, FLOP/s: the fastest of many matrix products.

    They are `size` x `size`, on CUDA 8,192 x 8,192, and go on for `seconds`. The first one, which
    may have to set kernels and threads up, does not count.
    """
    if device.type == "cuda":
        size = 8192
    if device.type == "cpu" and not multiplies_bfloat16(device):
        dtype = torch.float32  # half precision is emulated, and slower
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    a @ b
    best = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: on the device for CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # elsewhere it is in KiB


def require_finite(world: World, folder: Path, step: int, figures: dict[str, float]) -> None:
    """Raise RunFailed, on rank 0, if one of the figures is not finite; others end silently.

    All processes must have the same figures.
    """
    if all(map(math.isfinite, figures.values())):
        return
    if world.rank > 0:
        sys.exit(1)
    found = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    raise RunFailed(
        f"{folder}: found {found} at step {step}; wanted finite numbers; the last checkpoint and "
        "the best model are kept; the same command repeats the same steps; to go on, lower "
        "train.learning_rate, train.muon_learning_rate or train.max_grad_norm, or change "
        "train.precision"
    )


class Board:
    """Writes a TensorBoard event file.

    TensorBoard drops what earlier files of the folder say of `step` and later ones: those steps
    were lost, and are made again.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # Names sort by time. Unbuffered, so that an error is raised where it happens.
        file = open(folder / f"events.out.tfevents.{time.time_ns()}", "wb", buffering=0)
        self.records = RecordWriter(file)
        self.write(step, file_version="brain.Event:2")
        self.write(step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, **content: Any) -> None:
        event = Event(wall_time=time.time(), step=step, **content)
        self.records.write(event.SerializeToString())

    def close(self) -> None:
        self.records.close()


class Monitor:
    """The reports of one run. Use as a context manager.

    Losses, norms and speed are those since the last line of the log; `restart` begins to count.
    """

    def __init__(self, run: Run):
        self.run = run
        self.device = run.world.device
        self.progress: Progress | None = None
        self.board: Board | None = None
        dtype = PRECISIONS[run.config.train.precision]
        self.peak_flops = matmul_peak(self.device, dtype) * run.world.size
        self.restart()

    def __enter__(self) -> "Monitor":
        if self.run.world.rank == 0:
            step, task = self.run.state.step, self.run.config.task
            self.progress = Progress(self.run.total_steps, task, "step", initial=step)
            with self._may_fail("TensorBoard"):
                self.board = Board(self.run.folder / "tensorboard", step + 1)
            self._show_config()
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress:
            self.progress.__exit__()
        if self.board:
            self.board.close()

    @contextmanager
    def _may_fail(self, what: str) -> Iterator[None]:
        """Print a warning in place of an error."""
        try:
            yield
        except (OSError, UserError) as error:
            self.print_line(f"warning: {what}: {error}; the run goes on without")

    def _show_config(self) -> None:
        """Give TensorBoard the resolved config, as a text and as the run's hyperparameters."""
        settings: dict[str, str | int | float] = {}
        for key, value in flatten(self.run.saved_config).items():
            settings[key] = value if isinstance(value, int | float) else printable(str(value))
        lines = "\n".join(f"    {key} = {value}" for key, value in settings.items())
        experiment, start, _ = hparams(settings, dict.fromkeys(COMPARED, 0.0))
        for summary in (text("config", lines), experiment, start):
            self._write(summary)

    def _write(self, summary: Any) -> None:
        """Give TensorBoard a summary of the present step; nothing more after one that failed."""
        board, self.board = self.board, None
        if board:
            with self._may_fail("TensorBoard"):
                board.write(self.run.state.step, summary=summary)
                self.board = board

    def restart(self) -> None:
        """Begin to count: rates then leave out, say, an evaluation before."""
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.largest_norm = torch.zeros((), device=self.device)
        self.n_targets = 0
        self.n_tokens = 0
        self.flops = 0.0
        self.start_time = time.perf_counter()

    def count_step(self, micro_batches: list[Batch], loss_sum: Tensor, grad_norm: Tensor) -> None:
        """Count a step of this process, without waiting for the device.

        With fp16 a step whose gradients are not finite is skipped, so its norm does not count.
        """
        self.loss_sum += loss_sum
        if not self.run.scaler.is_enabled():
            self.largest_norm = torch.maximum(self.largest_norm, grad_norm)  # NaN stays NaN
        for batch in micro_batches:
            row_length = batch.input_ids.shape[1]
            self.n_tokens += batch.n_tokens
            self.n_targets += batch.n_targets
            self.flops += step_flops(
                self.run.model.config, batch.n_tokens, batch.n_targets, row_length
            )
        if self.progress:
            self.progress.update()

    def report_training(self, grad_norm: Tensor) -> None:
        """Report the mean loss since the last report, and the speed. Begins to count anew.

        Raises RunFailed if the loss or a gradient norm since then is not finite.
        """
        run, world = self.run, self.run.world
        counts = (self.n_targets, self.n_tokens, self.flops)
        loss_sum, norm_sum, n_targets, n_tokens, flops = world.sum(
            float(self.loss_sum), float(self.largest_norm), *counts
        )
        seconds = time.perf_counter() - self.start_time
        loss = loss_sum / max(1, n_targets)
        checked = {"loss": loss, "largest gradient norm": norm_sum / world.size}
        require_finite(world, run.folder, run.state.step, checked)
        figures = {
            "loss": loss,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "grad_norm": float(grad_norm),
            "tokens": run.state.n_tokens,
            "tokens_per_second": n_tokens / seconds,
            "target_tokens_per_second": n_targets / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / self.peak_flops,
            "peak_memory_gb": peak_memory(self.device) / 1e9,
        }
        for name, value in figures.items():
            self._write(scalar(f"train/{name}", value))
        if self.progress:
            self.progress.figures = {
                "loss": f"{loss:.3f}",
                "lr": f"{figures['learning_rate']:.1e}",
                "norm": f"{figures['grad_norm']:.2f}",
                "tok/s": f"{figures['tokens_per_second']:,.0f}",
                "targets/s": f"{figures['target_tokens_per_second']:,.0f}",
                "MFU": f"{figures['mfu']:.0%}",
                "GB": f"{figures['peak_memory_gb']:.1f}",
            }
        self.restart()

    def report_evaluation(self, metrics: Metrics, is_best: bool, samples: list[str]) -> None:
        """Report the figures of the held-out split, and texts that the model wrote."""
        run = self.run
        figures = {"loss": metrics.loss, "perplexity": metrics.perplexity}
        if metrics.bits_per_byte is not None:
            figures["bits_per_byte"] = metrics.bits_per_byte
        summary = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()
        )
        mark = " (best so far)" if is_best else ""
        self.print_line(f"step {run.state.step}: held-out {summary}{mark}")
        for name, value in figures.items():
            self._write(scalar(f"valid/{name}", value))
        for number, sample in enumerate(samples):
            self._write(text(f"samples/{number}", sample))
        if is_best and run.world.rank == 0:
            place = {"step": run.state.step, "tokens": run.state.n_tokens}
            with self._may_fail("the model card"):
                model_card.write_card(
                    run.model_dir, run.saved_config, run.n_parameters, place | figures, samples
                )
        self.restart()

    def print_line(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.progress:
            self.progress.write(printable(line))


def printable(line: str) -> str:
    """The text with escapes for what is not UTF-8, as in some names of files."""
    return line.encode("utf-8", "backslashreplace").decode()
