"""A race between contestants that take turns, and the report of its results.

A contestant is a function that does its work once and returns the seconds that it measured, one
number for each thing done (`timed` measures a function that does one). `Report.race` calls every
contestant once per round, so that a change in the machine's load meets all of them. The first round
warms up and is not counted. `Report.show` prints what the machine is, which takes a second, and a
line per contestant with its median, its quartiles, and how many times faster it is than the first
one of its race. All three are figures that were measured, not interpolated.

`positive` and `check_context` check the options that all benchmarks have.
"""

import json
import os
import statistics
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from gptchat.console import UserError


class Report:
    """The results so far, one dictionary per contestant and race; `show` prints them."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def race(
        self,
        what: str,
        unit: str,
        contestants: Mapping[str, Callable[[], Sequence[float]]],
        rounds: int,
        amount: float = 1,
    ) -> dict[str, float]:
        """Run the contestants in turn and add a line for each. Returns their medians in seconds.

        The lines show the seconds of each thing done, such as a decoding step, as milliseconds if
        `unit` is "ms", else as `amount` / seconds (`amount` is what one of these things handles,
        such as the tokens of a step).
        """
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for round_number in range(rounds + 1):
            for name, run in contestants.items():
                measured = run()
                if round_number > 0:
                    seconds[name] += measured
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        first_median = next(iter(medians.values()))
        for name, values in seconds.items():
            line: dict[str, Any] = {"what": what, "who": name}
            line |= quartiles(values, unit, amount)
            line |= {"unit": unit, "ratio": first_median / medians[name], "notes": {}}
            self.lines.append(line)
        return medians

    def note(self, who: str, **notes: Any) -> None:
        """Add notes to the latest line of the contestant `who`."""
        latest = [line for line in self.lines if line["who"] == who][-1]
        latest["notes"].update(notes)

    def show(self, as_json: bool) -> None:
        if as_json:
            print(json.dumps({"machine": machine(), "lines": self.lines}, indent=1))
            return
        print(", ".join(f"{key} {value}" for key, value in machine().items()))
        for line in self.lines:
            print(format_line(line))


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


def quartiles(seconds: Sequence[float], unit: str, amount: float) -> dict[str, float]:
    """Median and quartiles of what a line shows: milliseconds, or `amount` a second."""
    if unit == "ms":
        figures = sorted(value * 1e3 for value in seconds)
    else:
        figures = sorted(amount / value for value in seconds)
    return {
        "median": quantile(figures, 0.5),
        "low": quantile(figures, 0.25),
        "high": quantile(figures, 0.75),
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value at `share` (0 to 1) of an ordered list: always one that was measured."""
    return ordered[round(share * (len(ordered) - 1))]


def format_line(line: dict[str, Any]) -> str:
    spread = f"({line['low']:,.1f}-{line['high']:,.1f})"
    notes = [f"{key.replace('_', ' ')} {value}" for key, value in line["notes"].items()]
    return (
        f"{line['what']:22} {line['who']:22} {line['median']:10,.1f} {spread} {line['unit']:9} "
        f"{line['ratio']:6.2f} x  {', '.join(notes)}"
    )


def machine() -> dict[str, Any]:
    """What the results depend on. The memory bandwidth is that of the best of 20 sums of 256 MB."""
    block = torch.ones(1 << 26)
    best_seconds = min(timed(block.sum)[0] for _ in range(20))
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": os.environ.get("LD_PRELOAD", "the system's"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
        "read_gb_per_s": round(block.nbytes / best_seconds / 1e9, 1),
    }


def wait_for_device() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any]) -> list[float]:
    """The seconds that `run` takes, those of a GPU included, as a list of one."""
    start = time.perf_counter()
    run()
    wait_for_device()
    return [time.perf_counter() - start]
