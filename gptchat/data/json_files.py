"""JSON files: an object a line, or one array of objects. Documents of an LM are their `text`.

How a file begins decides whether it is one, whatever its ending. An object has at most LONGEST_LINE
characters, so memory is flat.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptchat.console import UserError
from gptchat.data.reading import LONGEST_LINE, filled_lines, read_text

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair, which UTF-8 cannot hold
_ARRAY_START = re.compile(r"\s*\[\s*")
_BETWEEN_ITEMS = re.compile(r"[\s,]*")
_JSON_START = re.compile(r'(\[\s*)?\{\s*"')


def is_json(path: str | Path) -> bool:
    return bool(_JSON_START.match(_beginning(path)))


def has_texts(path: str | Path) -> bool:
    """Whether the first object of a file has a `text`."""
    for number, entry in json_entries(path):
        return "text" in parse_object(entry, f"{path}:{number}", "text")
    return False


def read_texts(path: str | Path) -> Iterator[str]:
    """The `text` of each object of a file. Raises UserError that names the line of another one."""
    for number, entry in json_entries(path):
        place = f"{path}:{number}"
        values = parse_object(entry, place, "text")
        if not isinstance(values.get("text"), str):
            raise UserError(
                f"{place}: found an object with {', '.join(values) or 'nothing'}; wanted plain "
                "text, or objects with text (objects with messages are for a ChatLM)"
            )
        yield check_characters(values["text"], f"{place}: text")


def json_entries(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, JSON) of every line, or of every item of an array."""
    return _array_items(path) if _beginning(path).startswith("[") else filled_lines(path)


def _beginning(path: str | Path) -> str:
    text = ""
    for piece in read_text(path):
        text = (text + piece).lstrip()
        if len(text) > 100:
            break
    return text


def _array_items(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, JSON) of every item of an array, and of what follows if it does not end."""
    decoder = json.JSONDecoder()
    number = 1
    waiting = ""  # text that holds no whole item yet
    before = _ARRAY_START
    for piece in read_text(path):
        waiting += piece
        start = 0
        while match := before.match(waiting, start):
            number += match[0].count("\n")
            start, before = match.end(), _BETWEEN_ITEMS
            try:
                _, end = decoder.raw_decode(waiting, start)
            except (ValueError, RecursionError):
                break
            yield number, waiting[start:end]
            number += waiting.count("\n", start, end)
            start = end
        waiting = waiting[start:]
        if len(waiting) > LONGEST_LINE:
            raise UserError(
                f"{path}:{number}: found no object that ends within {LONGEST_LINE:,} characters"
            )
    if waiting.strip() != "]":
        yield number, waiting


def parse_object(entry: str, place: str, wanted: str) -> dict[str, Any]:
    """The object of an entry; `wanted` names the keys in an error."""
    try:
        values = json.loads(entry)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: column {error.colno}: found no JSON ({error.msg}); wanted an object a line, "
            "or an array of objects"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise UserError(f"{place}: found JSON that cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{place}: found {show(values)}; wanted an object with {wanted}")
    return values


def check_characters(text: str, field: str) -> str:
    if "\0" in text:
        raise UserError(f"{field}: found a NUL character; wanted text without it")
    if _SURROGATE.search(text):
        raise UserError(f"{field}: found half a surrogate pair; wanted Unicode text")
    return text


def show(value: Any) -> str:
    """A JSON value in an error: short, in one line."""
    return "nothing" if value is None else f"{value!r:.60}"
