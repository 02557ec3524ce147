r"""Files of dialogues: TSV rows and JSONL lines, read into turns of text and written from them.

TSV rows. A line of UTF-8 holds one dialogue, one turn a column, the response last. Inside a turn
a tab is written `\t`, a line feed `\n`, a carriage return `\r` and a backslash `\\`. When read, a
backslash before any other character, or at the end of a column, stands for itself. Empty columns
at the front of a row are skipped (a table whose rows have histories of different lengths); any
other empty column is an error, and so is a turn of white space alone.

JSONL. A line of UTF-8 holds one dialogue as a JSON object, in OpenAI's or in ShareGPT's form:

    {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]}
    {"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."}]}

Every message has one of the roles in SPEAKERS or SHAREGPT_SPEAKERS, and text that is not white
space alone. Roles need not alternate. In training the last message is the response and must be the
responder's ("assistant" or "gpt"). Other keys are ignored.

A file of dialogues is JSONL if its name ends in `.jsonl` or `.jsonl.gz`, else TSV. One that may as
well be text is TSV if it ends in `.tsv` or `.tsv.gz`. Errors: NULs, lines of more than 1,000,000
characters. Empty lines, a byte order mark, and CR LF or lone CR as line ends are accepted.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptchat.console import UserError
from gptchat.data.dialogue import SPEAKERS, TextTurn, alternate
from gptchat.data.reading import Source, first_line, read_lines

SHAREGPT_SPEAKERS = {"gpt": 1, "human": 0, "system": 0}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair, which UTF-8 cannot hold
_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r", "\\": r"\\"}  # character -> its escape
_CHARACTERS = {escaped: character for character, escaped in _ESCAPES.items()}


class _Form(NamedTuple):
    """How a JSONL line names its list of messages, and a message its role and its text."""

    messages: str
    role: str
    text: str
    responder: str  # a role
    speakers: dict[str, int]  # of all roles


_FORMS = (
    _Form("messages", "role", "content", "assistant", SPEAKERS),
    _Form("conversations", "from", "value", "gpt", SHAREGPT_SPEAKERS),
)


class Prompt(NamedTuple):
    """A dialogue of a file that is to be answered."""

    place: str  # FILE:LINE
    turns: list[TextTurn]
    line: str  # as it stands in the file, without its end


def escape(text: str) -> str:
    """A turn as it is written in a TSV column."""
    return re.sub(r"[\t\n\r\\]", lambda match: _ESCAPES[match[0]], text)


def unescape(column: str) -> str:
    """The turn that a TSV column stands for; the inverse of `escape`."""
    if "\\" not in column:
        return column
    return re.sub(r"\\[tnr\\]", lambda match: _CHARACTERS[match[0]], column)


def format_row(turns: Sequence[str]) -> str:
    """The TSV line of a dialogue, line feed and all; `read_rows` gives the turns back."""
    return "\t".join(escape(turn) for turn in turns) + "\n"


def read_rows(path: Source, min_turns: int = 2) -> Iterator[list[str]]:
    """The turns of every row of a TSV file, unescaped, oldest first.

    Raises UserError naming the line of a row that has an empty or blank column, a NUL character or
    fewer than `min_turns` turns, or is too long; or the byte where the file is not UTF-8.
    """
    for place, line in _read_filled_lines(path):
        yield parse_row(line, place, min_turns)


def read_dialogues(path: Source) -> Iterator[list[TextTurn]]:
    """The turns of every dialogue of a TSV or JSONL file, the response last.

    Raises UserError naming the line, in JSONL also the field, of what is no such dialogue or is too
    long; or the byte where the file is not UTF-8.
    """
    if not is_jsonl(path):
        yield from map(alternate, read_rows(path))
        return
    for place, line in _read_filled_lines(path):
        yield parse_messages(line, place, ends_with_response=True)


def read_prompts(path: str | Path) -> Iterator[Prompt]:
    """The dialogues of a TSV or JSONL file that are to be answered, whoever speaks last.

    Raises UserError as `read_dialogues` does.
    """
    for place, line in _read_filled_lines(path):
        if is_jsonl(path):
            turns = parse_messages(line, place, ends_with_response=False)
        else:
            turns = alternate(parse_row(line, place, 1), SPEAKERS["user"])
        yield Prompt(place, turns, line)


def format_answered(prompt: Prompt, answer: str, as_jsonl: bool) -> str:
    """The line of a file's prompt with the answer behind it, line feed and all.

    `as_jsonl` says what the file is; a JSONL line keeps its form, its roles and its other keys.
    """
    if not as_jsonl:
        return format_row([*(text for _, text in prompt.turns), answer])
    values = json.loads(prompt.line)
    (form,) = (form for form in _FORMS if form.messages in values)
    values[form.messages].append({form.role: form.responder, form.text: answer})
    # Keys that nobody checked may hold half a surrogate pair: it becomes its escape again.
    return json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


def is_jsonl(path: Source) -> bool:
    """Whether a file of dialogues is JSONL, which its ending says; else it is TSV."""
    return str(path).lower().removesuffix(".gz").endswith(".jsonl")


def is_tsv(path: Source) -> bool:
    """Whether a file that may as well be text is TSV, which its ending says."""
    return str(path).lower().removesuffix(".gz").endswith(".tsv")


def _read_filled_lines(path: Source) -> Iterator[tuple[str, str]]:
    """(FILE:LINE, text) of every line that is not empty."""
    for number, line in enumerate(read_lines(path), first_line(path)):
        if line:
            yield f"{path}:{number}", line


def parse_row(line: str, source: str, min_turns: int) -> list[str]:
    columns = line.lstrip("\t").split("\t")
    turns = [unescape(column) for column in columns] if "\\" in line else columns
    if len(turns) >= min_turns and all(map(str.strip, turns)) and "\0" not in line:
        return turns
    if len(turns) < min_turns:
        problem = "one column"
    elif "" in columns:
        problem = f"an empty column {columns.index('') + 1}"
    elif blank := [number for number, turn in enumerate(turns, 1) if not turn.strip()]:
        problem = f"white space alone in column {blank[0]}"
    else:
        problem = "a NUL character"
    raise UserError(f"{source}: found {problem}; wanted turns divided by tabs, the response last")


def parse_messages(line: str, place: str, ends_with_response: bool) -> list[TextTurn]:
    """The turns of a JSONL line; a response must be the responder's, and answer something."""
    form, messages = _find_messages(line, place)
    field = f"{place}: {form.messages}"
    turns = [_parse_message(message, form, f"{field}[{i}]") for i, message in enumerate(messages)]
    wanted = 2 if ends_with_response else 1
    if len(turns) < wanted:
        raise UserError(f"{field}: found {len(turns)}; wanted {wanted} or more")
    if ends_with_response and turns[-1][0] != form.speakers[form.responder]:
        raise UserError(
            f"{field}[{len(turns) - 1}].{form.role}: found {messages[-1][form.role]!r}; "
            f"wanted {form.responder!r}, the response last"
        )
    return turns


def _find_messages(line: str, place: str) -> tuple[_Form, list[Any]]:
    """The form of a JSONL line, and its messages, which are not checked yet."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: column {error.colno}: found no JSON ({error.msg}); wanted an object a line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise UserError(f"{place}: found JSON that cannot be read ({error})") from None
    names = " or ".join(form.messages for form in _FORMS)
    if not isinstance(values, dict):
        raise UserError(f"{place}: found {_show(values)}; wanted an object with {names}")
    forms = [form for form in _FORMS if form.messages in values]
    if len(forms) != 1:
        problem = "both keys" if forms else "neither key"
        raise UserError(f"{place}: found {problem}; wanted {names}")
    messages = values[forms[0].messages]
    if not isinstance(messages, list):
        field = f"{place}: {forms[0].messages}"
        raise UserError(f"{field}: found {_show(messages)}; wanted a list of messages")
    return forms[0], messages


def _parse_message(message: Any, form: _Form, field: str) -> TextTurn:
    if not isinstance(message, dict):
        wanted = f"an object with {form.role} and {form.text}"
        raise UserError(f"{field}: found {_show(message)}; wanted {wanted}")
    role, text = message.get(form.role), message.get(form.text)
    if not isinstance(role, str) or role not in form.speakers:
        wanted = f"one of {', '.join(form.speakers)}"
        raise UserError(f"{field}.{form.role}: found {_show(role)}; wanted {wanted}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{field}.{form.text}: found {_show(text)}; wanted some text")
    if "\0" in text:
        raise UserError(f"{field}.{form.text}: found a NUL character; wanted text without it")
    if _SURROGATE.search(text):
        raise UserError(f"{field}.{form.text}: found half a surrogate pair; wanted Unicode text")
    return form.speakers[role], text


def _show(value: Any) -> str:
    """A JSON value in an error: short, in one line."""
    return "nothing" if value is None else f"{value!r:.60}"
