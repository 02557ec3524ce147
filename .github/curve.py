"""Draw curve.svg, the losses of the default run: `python .github/curve.py` after `make lm chatlm`.

Reads the TensorBoard files of each run folder named on the command line (default: out/lm
out/chatlm). The picture has a background of its own, so that it is readable on a light and on a
dark page.
"""

import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 58, 46  # margins
GAP = 44  # between two runs
TITLES = {"lm": "LM: pre-training", "chatlm": "ChatLM: fine-tuning"}
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #22251f }
  .soft { fill: #63685d; font-size: 12px }
  .title { font-weight: 600 }
  .page { fill: #fffefb; stroke: #dfdbd0 }
  .grid { stroke: #dfdbd0 }
  .train { fill: none; stroke: #1f6660; stroke-width: 2; stroke-linejoin: round }
  .valid { fill: #b4532a }
  .link { fill: none; stroke: #b4532a; stroke-dasharray: 3 4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e9e8e1 }
    .soft { fill: #a2a698 }
    .page { fill: #20231f; stroke: #353930 }
    .grid { stroke: #353930 }
    .train { stroke: #7cc5bd }
    .valid { fill: #f0a070 }
    .link { stroke: #f0a070 }
  }
"""


def read_run(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def draw_run(title: str, run: EventAccumulator, left: float, width: float, y_of) -> list[str]:
    """A run's part of the picture, from x = `left` on: its two curves, labels and steps."""
    losses, held_out = run.Scalars("train/loss"), run.Scalars("valid/loss")
    n_steps = max(event.step for event in losses)

    def points_of(events: list[ScalarEvent]) -> list[tuple[float, float]]:
        return [(left + width * event.step / n_steps, y_of(event.value)) for event in events]

    def path_of(events: list[ScalarEvent]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points_of(events))

    parts = [text(left, TOP - 8, title, "title")]
    parts.append(f'<polyline class="train" points="{path_of(losses)}"/>')
    parts.append(f'<polyline class="link" points="{path_of(held_out)}"/>')
    bits = run.Scalars("valid/bits_per_byte")
    for (x, y), event in zip(points_of(held_out), bits, strict=True):
        parts.append(f'<circle class="valid" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(text(x, y - 10, f"{event.value:.2f}", "valid", "middle"))
    for step in (0, n_steps // 2, n_steps):
        x = left + width * step / n_steps
        parts.append(text(x, HEIGHT - BOTTOM + 18, str(step), "soft", "middle"))
    parts.append(text(left + width / 2, HEIGHT - 10, "optimizer step", "soft", "middle"))
    return parts


def draw(runs: dict[str, EventAccumulator]) -> str:
    losses = []
    for run in runs.values():
        for tag in ("train/loss", "valid/loss"):
            losses += [event.value for event in run.Scalars(tag)]
    low = math.floor(min(losses))
    high = math.ceil(2 * max(losses)) / 2
    plot_height = HEIGHT - TOP - BOTTOM
    run_width = (WIDTH - LEFT - RIGHT - GAP * (len(runs) - 1)) / len(runs)

    def y_of(loss: float) -> float:
        return TOP + plot_height * (high - loss) / (high - low)

    parts = [f'<rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>']
    parts.append(text(16, 24, "Loss of the default run, nats per token:", "soft"))
    parts.append('<path class="train" d="M266 20 h24"/>' + text(296, 24, "training", "soft"))
    parts.append('<circle class="valid" cx="366" cy="20" r="4"/>')
    parts.append(text(376, 24, "held-out text, labelled with its bits per byte", "soft"))
    for loss in range(low, int(high) + 1):
        parts.append(f'<path class="grid" d="M{LEFT} {y_of(loss):.1f} H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 10, y_of(loss) + 4, str(loss), "soft", "end"))
    for number, (name, run) in enumerate(runs.items()):
        left = LEFT + number * (run_width + GAP)
        parts += draw_run(TITLES.get(name, name), run, left, run_width, y_of)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def main() -> None:
    runs = [Path(name) for name in sys.argv[1:] or ("out/lm", "out/chatlm")]
    picture = draw({run.name: read_run(run) for run in runs})
    Path(__file__).with_name("curve.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
