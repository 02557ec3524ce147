"""Draw terminal.svg, a session: `python .github/terminal.py` after `make lm chatlm`.

Runs `gptchat chat --model out/chatlm/model --seed 1` in a terminal of its own, types the messages,
and draws what came, line after line as in the session. Another model folder may be named.
"""

import sys
from html import escape
from pathlib import Path

import pexpect

MESSAGES = (
    "Hi, how are you?",
    "What do you study?",
    "Do you like it?",
    "Do you have any plans for the weekend?",
    "What do you like to do on weekends?",
)
WIDTH, LINE, LEFT, TOP, COLUMNS = 760, 21, 20, 52, 88
SECONDS = 0.9  # between two lines
STYLE = """
  text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #d8dad2; white-space: pre }
  .screen { fill: #1b1e1a } .bar { fill: #2b2f29 } .dot { fill: #565c52 }
  .you { fill: #7cc5bd; font-weight: 600 } .bot { fill: #f0a070; font-weight: 600 }
  .line { opacity: 0; animation: come 0.3s forwards }
  @keyframes come { to { opacity: 1 } }
  @media (prefers-reduced-motion: reduce) { .line { opacity: 1; animation: none } }
"""
PROMPT = "you> "


def talk(model: str) -> list[str]:
    """The lines of the terminal: the command, what it says, and the conversation."""
    command = ["-m", "gptchat", "chat", "--model", model, "--seed", "1"]
    terminal = pexpect.spawn(
        sys.executable, command, encoding="utf-8", dimensions=(50, COLUMNS), timeout=120
    )
    terminal.expect_exact(PROMPT)
    screen = f"$ gptchat {' '.join(command[2:])}\r\n" + terminal.before
    for message in MESSAGES:
        terminal.sendline(message)
        terminal.expect_exact(PROMPT)
        screen += "you> " + terminal.before
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    lines = (line.rpartition("\r")[2] for line in screen.split("\r\n"))
    return [line.rstrip() for line in lines if line.strip()]


def draw(lines: list[str]) -> str:
    height = TOP + LINE * len(lines) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="A conversation in the terminal">',
        f"<style>{STYLE}</style>",
        f'<rect class="screen" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<path class="bar" d="M0 30V8a8 8 0 0 1 8-8H{WIDTH - 8}a8 8 0 0 1 8 8v22z"/>',
        *(f'<circle class="dot" cx="{x}" cy="15" r="5"/>' for x in (20, 38, 56)),
    ]
    for number, line in enumerate(lines):
        speaker, mark, words = line.partition("> ")
        label = f'<tspan class="{speaker}">{speaker}&gt;</tspan> ' if mark else ""
        parts.append(
            f'<text class="line" x="{LEFT}" y="{TOP + LINE * number}" '
            f'style="animation-delay: {SECONDS * number:.1f}s">'
            f"{label}{escape(words if mark else line)}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


def main(model: str = "out/chatlm/model") -> None:
    lines = talk(model)
    print("\n".join(lines))
    Path(__file__).with_name("terminal.svg").write_text(draw(lines), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
