"""What a training run reports: progress in the terminal, TensorBoard, two logs, the model card.

Only rank 0 writes; the figures are those of all processes. The loss log `log.jsonl` holds nothing
that depends on time, and a resumed run first cuts it back to the length that its checkpoint names:
however often a run was stopped, its log is that of an uninterrupted run, byte for byte. Speed goes
to the bar, to TensorBoard and to `speed.jsonl` (`run_log` describes both logs).
"""

import json
import math
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from gptchat.console import Progress, UserError
from gptchat.data.batches import Batch
from gptchat.model.gpt2 import GPT2Config
from gptchat.training import model_card
from gptchat.training.distributed import World
from gptchat.training.metrics import Metrics
from gptchat.training.run_log import LOG, SPEED, SpeedLog
from gptchat.training.saved_config import flatten

# What TensorBoard's table of runs shows beside their settings.
COMPARED = ("valid/loss", "valid/bits_per_byte", "train/loss", "train/tokens_per_second")

# Dense bfloat16 FLOP/s in the data sheets of GPUs, by the names that CUDA gives them: the peak that
# the field measures MFU by. A product of matrices reaches some 70 to 80 % of it.
DATA_SHEET_PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}


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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s that MFU is a share of: the data sheet's, or measured where none is known."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        if name in DATA_SHEET_PEAKS:
            return DATA_SHEET_PEAKS[name]
    return matmul_peak(device, dtype)


def matmul_peak(
    device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2
) -> float:
    """The measured peak of a device, FLOP/s: the fastest of many matrix products.

    They are `size` x `size`, on CUDA 8,192 x 8,192, and go on for `seconds`. The first one, which
    may have to set kernels and threads up, does not count: it has taken 0.3 s where others took
    0.006.
    """
    if device.type == "cuda":
        size = 8192
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


@contextmanager
def _errors_in_one_line(path: Path) -> Iterator[None]:
    """Raise UserError where `path` cannot be written, because the disk is full, say.

    TensorBoard writes in a thread: its error is raised by a later report.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}; the same command goes on from "
            "the last checkpoint"
        ) from None


class Monitor:
    """The reports of one run, from `step` of `total_steps` on. Use as a context manager.

    `log_bytes` is how much of an earlier log is kept. Rates count from the last report.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        model_config: GPT2Config,
        config: dict[str, Any],
        dtype: torch.dtype,
        step: int,
        total_steps: int,
        log_bytes: int,
    ):
        self.folder = folder
        self.world = world
        self.model_config = model_config
        self.step = step
        self.total_tokens = 0  # of the whole run, known from the first step on
        self.writes = world.rank == 0
        self.log_path = folder / LOG
        self.speed_path = folder / SPEED
        self.board_path = folder / "tensorboard"
        if self.writes:
            with _errors_in_one_line(self.log_path):
                self.log_file = open(self.log_path, "ab")
                kept = min(log_bytes, self.log_file.tell())  # truncate would fill up a shorter file
                self.log_file.truncate(kept)
                self.log_file.seek(kept)
            with _errors_in_one_line(self.speed_path):
                self.speed_log = SpeedLog(folder, step)
            with _errors_in_one_line(self.board_path):
                self.board = SummaryWriter(str(self.board_path), purge_step=step + 1)
                self._show_config(config)
            self.progress = Progress(total_steps, config["task"], "step", initial=step)
        self.peak_flops = peak_flops(world.device, dtype) * world.size
        self.restart_clock()

    def _show_config(self, config: dict[str, Any]) -> None:
        """Give TensorBoard the resolved config, as a text and as the run's hyperparameters."""
        settings: dict[str, str | int | float] = {}
        lines = []
        for key, value in flatten(config).items():
            settings[key] = value if isinstance(value, int | float) else str(value)
            lines.append(f"    {key} = {value!r}")
        self.board.add_text("config", "\n".join(lines), self.step)
        experiment, start, _ = hparams(settings, dict.fromkeys(COMPARED, 0.0))
        writer: Any = self.board.file_writer  # whose type says None
        for summary in (experiment, start):
            writer.add_summary(summary, self.step)

    def __enter__(self) -> "Monitor":
        self.hook_before = threading.excepthook
        threading.excepthook = self._thread_failed
        return self

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Print what ended a thread, except OSErrors: TensorBoard's are raised by `board` again."""
        if not isinstance(failure.exc_value, OSError):
            self.hook_before(failure)

    def __exit__(self, *error: object) -> None:
        if self.writes:
            self.progress.__exit__()
            self._close_files(has_failed=error[0] is not None)
        threading.excepthook = self.hook_before

    def _close_files(self, has_failed: bool) -> None:
        try:
            with _errors_in_one_line(self.board_path):
                self.board.close()
            with _errors_in_one_line(self.log_path):
                self.log_file.close()
            with _errors_in_one_line(self.speed_path):
                self.speed_log.close()
        except UserError:
            if not has_failed:  # else what ended the run is told instead
                raise

    def restart_clock(self) -> None:
        """Count tokens and time from now on: rates then leave out, say, an evaluation before."""
        self.n_tokens = 0
        self.n_targets = 0
        self.flops = 0.0
        self.start_time = time.perf_counter()

    def count_step(self, micro_batches: list[Batch], total_tokens: int) -> None:
        """Count a step that is done, of these micro-batches of this process.

        `total_tokens` is how many tokens all processes have trained on since the run began.
        """
        self.step += 1
        self.total_tokens = total_tokens
        for batch in micro_batches:
            row_length = batch.input_ids.shape[1]
            self.n_tokens += batch.n_tokens
            self.n_targets += batch.n_targets
            self.flops += step_flops(self.model_config, batch.n_tokens, batch.n_targets, row_length)
        if self.writes:
            self.progress.update()

    def report_training(self, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Report the mean loss since the last report, and the speed."""
        n_tokens, n_targets, flops = self.world.sum(self.n_tokens, self.n_targets, self.flops)
        seconds = time.perf_counter() - self.start_time
        figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        rates = {
            "tokens_per_second": n_tokens / seconds,
            "target_tokens_per_second": n_targets / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / self.peak_flops,
            "peak_memory_gb": peak_memory(self.world.device) / 1e9,
        }
        self._write("train", figures, rates)
        if self.writes:
            self.progress.figures = {
                "loss": f"{loss:.3f}",
                "lr": f"{learning_rate:.1e}",
                "norm": f"{grad_norm:.2f}",
                "tok/s": f"{rates['tokens_per_second']:,.0f}",
                "targets/s": f"{rates['target_tokens_per_second']:,.0f}",
                "MFU": f"{rates['mfu']:.0%}",
                "GB": f"{rates['peak_memory_gb']:.1f}",
            }
        self.restart_clock()

    def report_evaluation(self, metrics: Metrics, is_best: bool, samples: list[str]) -> None:
        """Report the figures of the held-out split, and texts that the model wrote."""
        figures = {"loss": metrics.loss, "perplexity": metrics.perplexity}
        if metrics.bits_per_byte is not None:
            figures["bits_per_byte"] = metrics.bits_per_byte
        self._write("valid", figures, {})
        summary = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items()
        )
        mark = " (best so far)" if is_best else ""
        self.print_line(f"step {self.step}: held-out {summary}{mark}")
        if self.writes:
            with _errors_in_one_line(self.board_path):
                for number, text in enumerate(samples):
                    self.board.add_text(f"samples/{number}", text, self.step)
                self.board.flush()
            if is_best:
                self._write_card(samples)
        self.restart_clock()

    def _write_card(self, samples: list[str]) -> None:
        """Write the card of the model that was just saved; a run does not fail for want of one."""
        try:
            model_card.write_card(self.folder, self.model_config, samples)
        except UserError as error:
            self.print_line(f"warning: no model card: {error}")

    def _write(self, kind: str, figures: dict[str, float], rates: dict[str, float]) -> None:
        """Write `figures`, which a resumed run repeats to the bit, to the loss log, `rates` to the
        speed log, and all to TensorBoard.

        Of a figure that is not finite (the gradient norm of a step that fp16 skipped, a perplexity
        beyond all floats) the log says null, since JSON has no word for it.
        """
        if not self.writes:
            return
        entry: dict[str, str | float | None] = {"step": self.step, "kind": kind}
        entry["tokens"] = self.total_tokens
        for name, value in figures.items():
            entry[name] = value if math.isfinite(value) else None
        with _errors_in_one_line(self.log_path):
            self.log_file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
            self.log_file.flush()
        with _errors_in_one_line(self.speed_path):
            self.speed_log.write(self.step, kind, rates)
        with _errors_in_one_line(self.board_path):
            for name, value in (figures | rates).items():
                self.board.add_scalar(f"{kind}/{name}", value, self.step)

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.writes:
            self.progress.write(text)

    def log_size(self) -> int:
        """Bytes in the loss log; 0 where this process does not write it."""
        if not self.writes:
            return 0
        return self.log_file.tell()
