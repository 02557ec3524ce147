"""Conversations out of the files of the package `chatterbot-corpus`, which are YAML of one form:

    categories:
    - greetings
    conversations:
    - - Hello
      - Hi, how are you?
        I have not seen you for long.
    - - 'Someone''s first turn'
      - "the answer"

A conversation's first turn stands behind two dashes, each further one behind a dash below the
second of them. A turn may go on in further lines, which are indented and joined by spaces, and may
stand in quotes. Other YAML, such as escapes and blocks, is refused with file and line.
"""

import re
from pathlib import Path

from gptchat.console import UserError

TURN = re.compile(r"(?P<first>-)?(?P<indent> +)- +(?P<text>.*)")


def read_conversations(path: Path) -> list[list[str]]:
    """The turns of each conversation, with single spaces between words.

    Raises UserError for a line that is not of the form of the module's docstring.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = lines.index("conversations:") + 1 if "conversations:" in lines else len(lines)
    conversations: list[list[str]] = []
    column = 0  # of the dash before the turns of the last conversation
    for number, line in enumerate(lines[begin:], begin + 1):
        match = TURN.fullmatch(line)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if match and match["first"]:
            column = match.start("text")
            conversations.append([match["text"]])
        elif match and match.start("text") == column:
            conversations[-1].append(match["text"])
        elif conversations and line.startswith(" "):
            conversations[-1][-1] += f" {line}"
        else:
            raise UserError(f"{path}:{number}: found {line!r:.60}; wanted `- - TURN` or `  - TURN`")
    return [[_unquote(turn, path) for turn in turns] for turns in conversations]


def _unquote(turn: str, path: Path) -> str:
    """The text of a turn as it stands in the file, possibly in quotes."""
    text = " ".join(turn.split())
    quote = text[:1]
    if quote not in ("'", '"', "|", ">"):
        return text
    is_closed = len(text) > 1 and text.endswith(quote)
    if quote in "|>" or not is_closed or (quote == '"' and "\\" in text):
        raise UserError(f"{path}: found {text!r:.60}; wanted a turn in one line, without escapes")
    inside = text[1:-1].strip()
    return inside.replace("''", "'") if quote == "'" else inside
