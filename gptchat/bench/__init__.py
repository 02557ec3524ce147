"""Speed of gptchat beside the alternatives: `gptchat bench`. Here is the race that all share.

A contestant is a function that does its work once and returns seconds, one number for each thing
done. `Report.race` calls every contestant once a round, so that a change in the machine's load
meets all of them. The first round warms up and is not counted. `Report.show` prints the machine and
a line per contestant. RESULTS.md has results.
"""

import os
import statistics
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from gptchat.console import UserError


@dataclass
class Line:
    """One contestant in one race: median and quartiles in `unit`, each a figure that was measured.

    `ratio` is how many times as fast it was as the first contestant.
    """

    what: str
    who: str
    median: float
    low: float
    high: float
    unit: str
    ratio: float
    notes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        spread = f"({self.low:,.1f}-{self.high:,.1f})"
        notes = [f"{key.replace('_', ' ')} {value}" for key, value in self.notes.items()]
        return (
            f"{self.what:22} {self.who:22} {self.median:10,.1f} {spread} {self.unit:9} "
            f"{self.ratio:6.2f} x  {', '.join(notes)}"
        )


class Report:
    def __init__(self) -> None:
        self.lines: list[Line] = []

    def race(
        self,
        what: str,
        unit: str,
        contestants: Mapping[str, Callable[[], Sequence[float]]],
        rounds: int,
        amount: float = 1,
    ) -> dict[str, float]:
        """Run the contestants in turn. Returns their medians in seconds.

        Their lines show milliseconds if `unit` is "ms", else `amount` a second, such as tokens.
        """
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for round_number in range(rounds + 1):
            for name, run in contestants.items():
                measured = run()
                if round_number > 0:
                    seconds[name] += measured
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        [first_median, *_] = medians.values()
        for name, values in seconds.items():
            if unit == "ms":
                figures = sorted(value * 1e3 for value in values)
            else:
                figures = sorted(amount / value for value in values)
            low, median, high = (figures[round(q * (len(figures) - 1))] for q in (0.25, 0.5, 0.75))
            ratio = first_median / medians[name]
            self.lines.append(Line(what, name, median, low, high, unit, ratio))
        return medians

    def note(self, who: str, **notes: Any) -> None:
        """Add notes to the latest line of the contestant `who`."""
        latest = [line for line in self.lines if line.who == who][-1]
        latest.notes.update(notes)

    def show(self) -> None:
        print(", ".join(f"{key} {value}" for key, value in machine().items()))
        for line in self.lines:
            print(line)


def positive(text: str) -> int:
    """The integer that an option gives, 1 or more; for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"found {text!r}; wanted an integer of at least 1")
    return int(text)


def check_context(n_tokens: int, options: str, n_positions: int) -> None:
    """Raise UserError if what `options` ask for is longer than the model's context."""
    if n_tokens > n_positions:
        message = f"{n_tokens} tokens ({options}) do not fit into the model's context"
        raise UserError(f"{message} of {n_positions}")


def machine() -> dict[str, Any]:
    """What the results depend on. `read_gb_per_s` is measured on sums of 256 MB."""
    block = torch.ones(1 << 26)
    best_seconds = min(timed(block.sum)[0] for _ in range(20))
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": os.environ.get("LD_PRELOAD", "the system's"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "read_gb_per_s": round(block.nbytes / best_seconds / 1e9, 1),
    }


def wait_for_device() -> None:
    """Wait until the GPU, if it was used, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> list[float]:
    """The seconds that `run` takes, including the GPU's, as a list of one."""
    start = time.perf_counter()
    run()
    wait_for_device()
    return [time.perf_counter() - start]
