"""`gptchat runs`: a table of the runs in some folders, each with the figures of its best model.

Bits per byte compare runs with different tokenizers, losses do not.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from gptchat.console import CommandParser, cli
from gptchat.training.run_log import RunLog, find_runs, read_run

COLUMNS = "run task size step tokens minutes tokens/s best-at loss bits/byte".split()


def describe(log: RunLog) -> list[str]:
    """The cells of a run's row; what is not known is empty."""
    last = log.entries[-1] if log.entries else {}
    minutes = [entry["minutes"] for entry in log.entries if "minutes" in entry]
    rates = [entry["tokens_per_second"] for entry in log.entries if "tokens_per_second" in entry]
    best = log.best() or {}
    return [
        str(log.folder),
        log.config["task"],
        size_of_model(log.folder),
        show(last.get("step")),
        show(last.get("tokens")),
        show(minutes[-1] if minutes else None, 1),
        show(sorted(rates)[len(rates) // 2] if rates else None),
        show(best.get("step")),
        show(best.get("loss"), 4),
        show(best.get("bits_per_byte"), 4),
    ]


def size_of_model(run: Path) -> str:
    """Layers x width of the run's model; empty where none has been saved."""
    try:
        config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
        return f"{config['n_layer']} x {config['n_embd']}"
    except (OSError, ValueError, KeyError):
        return ""


def show(value: float | None, decimals: int = 0) -> str:
    return "" if value is None else f"{value:,.{decimals}f}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first three to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if number < 3 else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "runs",
        "List training runs with the figures of their best models, as measured on held-out data.\n"
        "The speed is the median; lower losses and bits per byte are better.",
        "gptchat runs out",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="DIR",
        default=["out"],
        help="searched for runs (default: out)",
    )
    arguments = parser.parse_args(argv)
    logs = [read_run(folder) for folder in find_runs([Path(name) for name in arguments.folders])]
    print(format_table([COLUMNS, *map(describe, logs)]))


if __name__ == "__main__":
    cli(main)
