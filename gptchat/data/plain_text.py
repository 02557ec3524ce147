"""The text that a vocabulary is trained on, out of files of text and of dialogues."""

import json
import re
from contextlib import suppress
from pathlib import Path

from gptchat.data.dialogue_files import is_jsonl, is_tsv, unescape

_JSON_TEXT = re.compile(r'"(?:content|value)"\s*:\s*("(?:[^"\\]|\\.)*")')


def plain_text(path: Path, piece: str) -> str:
    """A piece of a file as the text that a vocabulary is trained on: of dialogues the turns alone.

    A file is one of dialogues if its name says so, by `is_jsonl` or `is_tsv`. Any other is text as
    it is, also one that a ChatLM reads as TSV. The piece may begin or end within a dialogue.
    """
    if is_jsonl(path):
        texts = []
        for literal in _JSON_TEXT.findall(piece):
            with suppress(ValueError):  # training would tell; a vocabulary does not need the line
                texts.append(json.loads(literal))
        return "\n".join(texts).encode(errors="replace").decode()
    if is_tsv(path):
        return "\n".join(unescape(column) for column in piece.replace("\t", "\n").split("\n"))
    return piece
