"""Draw minutes.svg, held-out bits per byte over minutes, of the default run and of the evening:
`python .github/minutes.py` after `make lm chatlm` and `make lm chatlm CONFIGS=configs/evening`.

Reads the TensorBoard files of the four runs in out/; another folder than out/ may be named.
"""

import sys
from pathlib import Path

from curve import STYLE, read_run, text

WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 66, 46  # margins
GAP = 56  # between the two parts
PARTS = {"lm": "LM: held-out text", "chatlm": "ChatLM: held-out responses"}
STEPS = (1, 2, 5, 10, 15, 30, 60, 120)  # minutes between ticks
Points = list[tuple[float, float]]  # minutes, bits per byte


def read_points(run: Path) -> Points:
    """Held-out bits per byte over the minutes since the start of a run that was not stopped."""
    events = read_run(run)
    start = events.FirstEventTimestamp()
    bits = events.Scalars("valid/bits_per_byte")
    return [((event.wall_time - start) / 60, event.value) for event in bits]


def draw_part(title: str, default: Points, evening: Points, left: float, width: float) -> list[str]:
    """One part of the picture, from x = `left` on: both curves and their axes."""
    bits = [y for _, y in default + evening]
    low, high = min(bits) - 0.03, max(bits) + 0.03
    last = max(x for x, _ in default + evening)
    bottom = HEIGHT - BOTTOM

    def place(point: tuple[float, float]) -> tuple[float, float]:
        minutes, y = point
        return left + width * minutes / last, TOP + (bottom - TOP) * (high - y) / (high - low)

    parts = [text(left, TOP - 12, title, "title")]
    for tick in range(int(low * 20) + 1, int(high * 20) + 1):
        _, y = place((0, tick / 20))
        parts.append(f'<path class="grid" d="M{left} {y:.1f} h{width:.1f}"/>')
        parts.append(text(left - 8, y + 4, f"{tick / 20:.2f}", "soft", "end"))
    step = next(step for step in STEPS if step >= last / 6)
    for minutes in range(0, int(last) + 1, step):
        x, _ = place((minutes, low))
        parts.append(text(x, bottom + 18, str(minutes), "soft", "middle"))
    parts.append(text(left + width / 2, HEIGHT - 10, "minutes", "soft", "middle"))
    for kind, points in (("link", default), ("train", evening)):
        places = [place(point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        x, y = places[-1]
        name = "valid" if kind == "link" else ""
        parts.append(text(x, y + 18, f"{points[-1][1]:.3f}", name, "end"))
    return parts


def draw(folder: Path) -> str:
    width = (WIDTH - LEFT - RIGHT - GAP) / 2
    parts = [f'<rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>']
    parts.append(text(16, 24, "Held-out bits per byte:", "soft"))
    parts.append('<path class="link" d="M166 20 h24"/>' + text(196, 24, "default", "soft"))
    parts.append('<path class="train" d="M258 20 h24"/>' + text(288, 24, "evening", "soft"))
    for number, (task, title) in enumerate(PARTS.items()):
        default, evening = read_points(folder / task), read_points(folder / "evening" / task)
        left = LEFT + number * (width + GAP)
        parts += draw_part(title, default, evening, left, width)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'
    )


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else "out")
    Path(__file__).with_name("minutes.svg").write_text(draw(folder), encoding="utf-8")


if __name__ == "__main__":
    main()
