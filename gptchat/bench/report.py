"""Contestants that take turns, and the table of their figures."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch


class Report:
    """Lines of a table, or of JSON: what was measured, of whom, its median and quartiles, the ratio to the first."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def race(
        self,
        what: str,
        unit: str,
        contestants: dict[str, Callable[[], Sequence[float]]],
        rounds: int,
        amount: float = 1,
    ) -> dict[str, float]:
        """Let the contestants, each of which returns seconds, take turns. Returns their medians in seconds; the table
        has ms or, in any other unit, `amount` / seconds."""
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name, run in contestants.items():
                measured = run()
                seconds[name] += measured if number else []
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        first = next(iter(medians.values()))
        for name, values in seconds.items():
            figures = sorted(value * 1e3 if unit == "ms" else amount / value for value in values)
            low, middle, high = (
                figures[round(share * (len(figures) - 1))] for share in (0.25, 0.5, 0.75)
            )
            self.lines.append(
                {
                    "what": what,
                    "who": name,
                    "median": middle,
                    "low": low,
                    "high": high,
                    "unit": unit,
                    "ratio": first / medians[name],
                    "notes": {},
                }
            )
        return medians

    def note(self, who: str, **notes: Any) -> None:
        """Add to the latest line of that contestant."""
        next(line for line in reversed(self.lines) if line["who"] == who)["notes"] |= notes

    def show(self, as_json: bool) -> None:
        if as_json:
            return print(json.dumps({"machine": machine(), "lines": self.lines}, indent=1))
        print(", ".join(f"{key} {value}" for key, value in machine().items()))
        for line in self.lines:
            notes = ", ".join(
                f"{key.replace('_', ' ')} {value}" for key, value in line["notes"].items()
            )
            print(
                "{what:22} {who:22} {median:10,.1f} ({low:,.1f}-{high:,.1f}) {unit:9} {ratio:6.2f} x  ".format(
                    **line
                )
                + notes
            )


def machine() -> dict[str, Any]:
    """What the figures hold for. The bandwidth is that of reading, the best of several sums over 256 MB."""
    block = torch.ones(1 << 26)
    best = min(timed(block.sum)[0] for _ in range(20))
    return {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": os.environ.get("LD_PRELOAD", "the system's"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
        "read_gb_per_s": round(block.nbytes / best / 1e9, 1),
    }


def timed(run: Callable[[], Any]) -> list[float]:
    start = time.perf_counter()
    run()
    return [time.perf_counter() - start]
