"""`gptchat plot`: the curves of one or several runs in a picture, by matplotlib (the extra `plot`).

A run has one colour: a line for what is measured in training, a dashed line with dots for what is
measured on held-out data.
"""

import math
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from gptchat.console import CommandParser, UserError, cli
from gptchat.files import atomic_write
from gptchat.training.run_log import Entry, RunLog, find_runs, read_run

FIGURES = {
    "loss": "loss (nats per token)",
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "mfu": "model FLOPs utilization (MFU)",
    "peak_memory_gb": "peak memory (GB)",
}
AXES = {
    "steps": ("step", "optimizer step"),
    "tokens": ("tokens", "tokens trained on"),
    "minutes": ("minutes", "minutes of training"),
}
FORMATS = (".png", ".svg")
STYLES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1.2},
    "valid": {"linestyle": "--", "marker": "o", "markersize": 4},
}


def curve(entries: Sequence[Entry], x_key: str, y_key: str) -> tuple[list[float], list[float]]:
    """The points of the entries that have both figures."""
    points = []
    for entry in entries:
        x, y = entry.get(x_key), entry.get(y_key)
        if x is not None and y is not None and math.isfinite(y):
            points.append((x, y))
    return [x for x, _ in points], [y for _, y in points]


def draw(logs: Sequence[RunLog], figure: str, over: str, path: Path) -> None:
    """Write the picture. Raises UserError where no run has such points, or it cannot be written."""
    from matplotlib.figure import Figure

    x_key, x_label = AXES[over]
    picture = Figure(figsize=(8, 4.5), layout="constrained")
    axes = picture.subplots()
    for number, log in enumerate(logs):
        label: str | None = str(log.folder)
        for kind, style in STYLES.items():
            x, y = curve(log.of_kind(kind), x_key, figure)
            if x:
                axes.plot(x, y, color=f"C{number}", label=label, **style)
                label = None  # a run stands in the legend once
    if not axes.lines:
        runs = ", ".join(str(log.folder) for log in logs)
        raise UserError(f"{runs}: found no {figure} with {over}; wanted a run that has logged some")
    axes.set(xlabel=x_label, ylabel=FIGURES[figure])
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        picture.savefig(temporary, format=path.suffix[1:], dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        "plot",
        "Draw the curves of training runs into a PNG or SVG file: lines for training, dashed\n"
        "lines for held-out data.",
        "gptchat plot out/* --figure bits_per_byte --over minutes --to runs.svg",
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="searched for runs")
    add("--figure", choices=FIGURES, default="loss", help="default: loss")
    add("--over", choices=AXES, default="steps", help="default: steps")
    add("--to", metavar="FILE", default="runs.png", help="default: runs.png")
    arguments = parser.parse_intermixed_args(argv)
    path = Path(arguments.to)
    if path.suffix not in FORMATS:
        raise UserError(f"--to {path}: wanted a name that ends in {' or '.join(FORMATS)}")
    if not util.find_spec("matplotlib"):
        raise UserError("found no package matplotlib; wanted: python -m pip install matplotlib")
    # A pattern such as out/* names files and folders without runs, too.
    folders = [Path(name) for name in arguments.folders if not Path(name).is_file()]
    draw([read_run(run) for run in find_runs(folders)], arguments.figure, arguments.over, path)
    print(path)


if __name__ == "__main__":
    cli(main)
