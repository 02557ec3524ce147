"""What a training run reports: progress in the terminal, and TensorBoard.

Rank 0 writes; the figures are those of all processes. If TensorBoard's file cannot be written, one
line says so and the run goes on without it. A loss, gradient or weight that is not a finite number
does end a run (`require_finite`): it is not saved.
"""

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import scalar, text

from gptchat.config import flatten
from gptchat.console import Progress, RunFailed
from gptchat.data.batches import Batch
from gptchat.model.gpt2 import GPT2Config
from gptchat.runtime import multiplies_bfloat16
from gptchat.training.distributed import World
from gptchat.training.metrics import PRECISIONS, Metrics
from gptchat.training.start import Run


def step_flops(config: GPT2Config, n_tokens: int, n_targets: int, row_length: int) -> float:
    """Floating-point operations of forward and backward (Chowdhery et al. 2022, appendix B).

    The output head counts for targets only; attention is over rows of `row_length` positions.
    """
    inner = config.n_inner or 4 * config.n_embd
    block = 4 * config.n_embd**2 + 2 * config.n_embd * inner
    attention = 12 * config.n_layer * config.n_embd * row_length
    head = config.vocab_size * config.n_embd
    return n_tokens * (6 * config.n_layer * block + attention) + 6 * n_targets * head


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The measured peak of a device in FLOP/s: the fastest matrix product within 0.2 s."""
    size = 8192 if device.type == "cuda" else 1024
    if device.type == "cpu" and not multiplies_bfloat16(device):
        dtype = torch.float32  # half precision is emulated, and slower
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    a @ b  # sets kernels and threads up
    best = math.inf
    end = time.perf_counter() + 0.2
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # elsewhere it is in KiB


def require_finite(world: World, folder: Path, step: int, figures: dict[str, float]) -> None:
    """Raise RunFailed on rank 0, and end the other processes, if a figure is not finite.

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


class Monitor:
    """The reports of one run, a context manager.

    Losses, norms and speed are those since the last report; `restart` begins to count.
    """

    def __init__(self, run: Run):
        self.run = run
        self.device = run.world.device
        self.progress: Progress | None = None
        self.board: RecordWriter | None = None
        dtype = PRECISIONS[run.config.train.precision]
        self.peak_flops = matmul_peak(self.device, dtype) * run.world.size
        self.restart()

    def __enter__(self) -> "Monitor":
        if self.run.world.rank == 0:
            step, task = self.run.state.step, self.run.config.task
            self.progress = Progress(self.run.total_steps, task, "step", initial=step)
            self._open_board()
            config = flatten(self.run.saved_config)
            lines = "\n".join(f"    {key} = {value}" for key, value in config.items())
            # Names of files that are not UTF-8 become escapes.
            lines = lines.encode("utf-8", "backslashreplace").decode()
            self._write_summary(text("config", lines))
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress:
            self.progress.__exit__()
        if self.board:
            self.board.close()

    def _open_board(self) -> None:
        """Begin an event file of TensorBoard.

        TensorBoard drops what earlier files say of later steps than the run's: they are made again.
        """
        folder, step = self.run.folder / "tensorboard", self.run.state.step + 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Names sort by time. Unbuffered, so that an error is raised when it happens.
            file = open(folder / f"events.out.tfevents.{time.time_ns()}", "wb", buffering=0)
        except OSError as error:
            self._warn(error)
            return
        self.board = RecordWriter(file)
        self._write(step=step, file_version="brain.Event:2")
        self._write(step=step, session_log=SessionLog(status=SessionLog.START))

    def _write_summary(self, summary: Any) -> None:
        self._write(step=self.run.state.step, summary=summary)

    def _write(self, **content: Any) -> None:
        """Write an event to TensorBoard's file; nothing more after one that failed."""
        if self.board:
            try:
                event = Event(wall_time=time.time(), **content)
                self.board.write(event.SerializeToString())
            except OSError as error:
                self.board = None
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        self.print_line(f"warning: TensorBoard: {error}; the run goes on without")

    def restart(self) -> None:
        """Begin to count; the speed leaves out what was before, such as an evaluation."""
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
        """Report the mean loss since the last report, and the speed.

        Raises RunFailed if the loss or a gradient norm since then is not finite.
        """
        run, world = self.run, self.run.world
        loss_sum, norm_sum, n_targets, n_tokens, flops = world.sum(
            float(self.loss_sum),
            float(self.largest_norm),
            self.n_targets,
            self.n_tokens,
            self.flops,
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
            "mfu": flops / seconds / self.peak_flops,
            "peak_memory_gb": peak_memory(self.device) / 1e9,
        }
        for name, value in figures.items():
            self._write_summary(scalar(f"train/{name}", value))
        if self.progress:
            self.progress.figures = (
                f"loss {loss:.3f}, lr {figures['learning_rate']:.1e}, "
                f"norm {figures['grad_norm']:.2f}, {figures['tokens_per_second']:,.0f} tok/s, "
                f"MFU {figures['mfu']:.0%}, {figures['peak_memory_gb']:.1f} GB"
            )
        self.restart()

    def report_evaluation(self, metrics: Metrics, is_best: bool) -> None:
        figures = {"loss": metrics.loss, "perplexity": metrics.perplexity}
        if metrics.bits_per_byte is not None:
            figures["bits_per_byte"] = metrics.bits_per_byte
        for name, value in figures.items():
            self._write_summary(scalar(f"valid/{name}", value))
        summary = ", ".join(f"{name.replace('_', ' ')} {figures[name]:.4g}" for name in figures)
        mark = " (best so far)" if is_best else ""
        self.print_line(f"step {self.run.state.step}: held-out {summary}{mark}")
        self.restart()

    def print_line(self, line: str) -> None:
        if self.progress:
            self.progress.write(line)
