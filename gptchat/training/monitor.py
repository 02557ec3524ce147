"""What a training run tells: a progress bar or plain lines, TensorBoard, and a loss log that a resumed run cuts back to
its checkpoint. Only the first process writes; the figures are those of all."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from gptchat.console import Progress
from gptchat.data.batches import Batch
from gptchat.model.gpt2 import GPT2Config
from gptchat.training.distributed import World
from gptchat.training.metrics import Metrics


def step_flops(config: GPT2Config, n_tokens: int, n_targets: int, row: int) -> float:
    """Floating-point operations of forward and backward: 6 per weight and token, the head's at target positions only,
    and attention over rows of `row` positions (Chowdhery et al. 2022, "PaLM", appendix B)."""
    inner = config.n_inner or 4 * config.n_embd
    block = 4 * config.n_embd**2 + 2 * config.n_embd * inner
    attention = 12 * config.n_layer * config.n_embd * row
    return (
        n_tokens * (6 * config.n_layer * block + attention)
        + 6 * n_targets * config.vocab_size * config.n_embd
    )


def matmul_peak(
    device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.3
) -> float:
    """FLOP/s of the best of several square matrix products: this machine's measured peak. On CUDA `size` is 8,192."""
    size = 8192 if device.type == "cuda" else size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of the device on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


class Monitor:
    """Use as a context manager. `log_bytes` is how much of an earlier log is kept, `step` where the run stands."""

    def __init__(
        self,
        folder: Path,
        world: World,
        config: GPT2Config,
        dtype: torch.dtype,
        task: str,
        step: int,
        total: int,
        log_bytes: int,
    ):
        self.world, self.config, self.step = world, config, step
        self.writes = world.rank == 0
        if self.writes:
            self.file = open(folder / "log.jsonl", "ab")
            self.file.truncate(
                min(log_bytes, self.file.tell())
            )  # no longer than it is, if someone cut it
            self.file.seek(0, 2)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            self.progress = Progress(total, task, "step", initial=step)
        self.peak = matmul_peak(world.device, dtype) * world.size
        self.restart_clock()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        if self.writes:
            self.progress.__exit__()
            self.board.close()
            self.file.close()

    def restart_clock(self) -> None:
        """Leave out of the rates what was not training."""
        self.tokens = self.targets = 0
        self.flops, self.since = 0.0, time.perf_counter()

    def count(self, micro_batches: list[Batch]) -> None:
        """A step is done."""
        self.step += 1
        for batch in micro_batches:
            rows, length = batch.input_ids.shape
            self.tokens += batch.n_tokens
            self.targets += batch.n_targets
            self.flops += step_flops(self.config, batch.n_tokens, batch.n_targets, length)
        if self.writes:
            self.progress.update()

    def training(self, loss: float, learning_rate: float, grad_norm: float) -> None:
        """Tell the mean loss since the last time, and how fast it went."""
        tokens, targets, flops = self.world.sum(self.tokens, self.targets, self.flops)
        seconds = time.perf_counter() - self.since
        rates = {
            "tokens_per_second": tokens / seconds,
            "target_tokens_per_second": targets / seconds,
            "mfu": flops / seconds / self.peak,
            "peak_memory_gb": peak_memory(self.world.device) / 1e9,
        }
        self.write(
            "train", {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}, rates
        )
        if self.writes:
            self.progress.figures = {
                "loss": f"{loss:.3f}",
                "lr": f"{learning_rate:.1e}",
                "norm": f"{grad_norm:.2f}",
                "tok/s": f"{tokens / seconds:,.0f}",
                "targets/s": f"{targets / seconds:,.0f}",
                "MFU": f"{rates['mfu']:.0%}",
                "GB": f"{rates['peak_memory_gb']:.1f}",
            }
        self.restart_clock()

    def evaluation(self, metrics: Metrics, best: bool, samples: list[str]) -> None:
        """Tell what was measured on the held-out split."""
        figures = {"loss": metrics.loss, "perplexity": metrics.perplexity}
        if metrics.bits_per_byte is not None:
            figures["bits_per_byte"] = metrics.bits_per_byte
        self.write("valid", figures, {})
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        self.line(f"step {self.step}: held-out {told}{' (best so far)' if best else ''}")
        if self.writes:
            for number, text in enumerate(samples):
                self.board.add_text(f"samples/{number}", text, self.step)
        self.restart_clock()

    def write(self, kind: str, figures: dict[str, float], rates: dict[str, float]) -> None:
        """To TensorBoard all of it, to the loss log what a resumed run repeats to the bit."""
        if not self.writes:
            return
        self.file.write(json.dumps({"step": self.step, "kind": kind} | figures).encode() + b"\n")
        self.file.flush()
        for name, value in (figures | rates).items():
            self.board.add_scalar(f"{kind}/{name}", value, self.step)

    def line(self, text: str) -> None:
        if self.writes:
            self.progress.write(text)

    def size(self) -> int:
        """Bytes in the loss log."""
        return self.file.tell() if self.writes else 0
