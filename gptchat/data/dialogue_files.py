r"""Files of dialogues: the formats TSV and JSON, read into turns and written with an answer.

TSV. A line holds one dialogue, one turn a column, the response last. Inside a turn a tab is written
`\t`, a line feed `\n`, a carriage return `\r` and a backslash `\\`. When read, a backslash before
any other character, or at the end of a column, stands for itself. Empty columns at the front of a
row are skipped (a table whose rows have histories of different lengths). Any other empty column is
an error, and so is a turn of white space alone.

JSON. A line holds one dialogue as an object, in OpenAI's or in ShareGPT's form:

    {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]}
    {"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."}]}

Every message has one of the roles in SPEAKERS or SHAREGPT_SPEAKERS, and text that is not white
space alone. Roles need not alternate. In training the last message is the response and must be the
responder's ("assistant" or "gpt"). Other keys are ignored.

A file is JSON if its name ends in `.jsonl` or `.jsonl.gz`, else TSV. Empty lines are skipped. NULs
and lines of more than 1,000,000 characters are errors. reading.py has the rules for all text.

A format is an entry of FORMATS. Whatever reads or writes dialogues finds it there by `format_of`.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptchat.console import UserError
from gptchat.data.dialogue import SPEAKERS, TextTurn, alternate
from gptchat.data.reading import Source, first_line, read_lines, read_text

SHAREGPT_SPEAKERS = {"gpt": 1, "human": 0, "system": 0}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair, which UTF-8 cannot hold
_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r", "\\": r"\\"}  # character -> its escape
_CHARACTERS = {escaped: character for character, escaped in _ESCAPES.items()}


@dataclass(frozen=True)
class Format:
    """How files of dialogues are read, and written with answers.

    An entry is one dialogue as the file has it, such as a line. `entries` yields each with the
    number of its line. `turns(entry, place, is_prompt)` are its turns. The last one is the
    response, or with `is_prompt` what is to be answered. It raises UserError, which begins with
    `place`, if there are fewer than two turns, or than one of a prompt. `answered(entry, answer)`
    is what a file holds for the entry with an answer behind it.
    """

    name: str
    endings: tuple[str, ...]  # of file names, `.gz` apart
    entries: Callable[[Source], Iterator[tuple[int, Any]]]
    turns: Callable[[Any, str, bool], list[TextTurn]]
    answered: Callable[[Any, str], str]


class Prompt(NamedTuple):
    """A dialogue of a file that is to be answered."""

    place: str  # FILE:LINE
    turns: list[TextTurn]
    entry: Any  # of the file's format


def format_of(path: Source) -> Format:
    """The format of a file of dialogues."""
    return format_named(path) or TSV


def format_named(path: Source) -> Format | None:
    """The format that a file's ending names, if it names one."""
    name = str(path).lower().removesuffix(".gz")
    return next((format for format in FORMATS if name.endswith(format.endings)), None)


def read_dialogues(path: Source) -> Iterator[list[TextTurn]]:
    """The turns of every dialogue of a file, the response last.

    Raises UserError that names the line, in JSON also the field, of what is no such dialogue.
    """
    format = format_of(path)
    for number, entry in format.entries(path):
        yield format.turns(entry, f"{path}:{number}", False)


def read_prompts(path: Source) -> Iterator[Prompt]:
    """The dialogues of a file that are to be answered, whoever speaks last.

    Raises UserError as `read_dialogues` does.
    """
    format = format_of(path)
    for number, entry in format.entries(path):
        place = f"{path}:{number}"
        yield Prompt(place, format.turns(entry, place, True), entry)


def texts_of(path: Source) -> Iterator[str]:
    """The text that a vocabulary is trained on: of dialogues the turns, else pieces of a file.

    A file is one of dialogues if its ending names their format.
    """
    if not format_named(path):
        yield from read_text(path)
        return
    for prompt in read_prompts(path):
        yield "\n".join(text for _, text in prompt.turns)


def filled_lines(path: Source) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not empty."""
    for number, line in enumerate(read_lines(path), first_line(path)):
        if line:
            yield number, line


# --- TSV


def escape(text: str) -> str:
    """A turn as it is written in a TSV column."""
    return re.sub(r"[\t\n\r\\]", lambda match: _ESCAPES[match[0]], text)


def unescape(column: str) -> str:
    """The turn that a TSV column stands for; the inverse of `escape`."""
    if "\\" not in column:
        return column
    return re.sub(r"\\[tnr\\]", lambda match: _CHARACTERS[match[0]], column)


def format_row(turns: Sequence[str]) -> str:
    """The TSV line of a dialogue, line feed and all."""
    return "\t".join(escape(turn) for turn in turns) + "\n"


def _row_turns(line: str, place: str, is_prompt: bool) -> list[TextTurn]:
    columns = line.lstrip("\t").split("\t")
    turns = [unescape(column) for column in columns] if "\\" in line else columns
    if len(turns) < (1 if is_prompt else 2):
        problem = "one column"
    elif "\0" in line:
        problem = "a NUL character"
    elif "" in columns:
        problem = f"an empty column {columns.index('') + 1}"
    elif not all(map(str.strip, turns)):
        blank = next(number for number, turn in enumerate(turns, 1) if not turn.strip())
        problem = f"white space alone in column {blank}"
    else:
        return alternate(turns, SPEAKERS["user" if is_prompt else "assistant"])
    raise UserError(f"{place}: found {problem}; wanted turns divided by tabs, the response last")


def _answered_row(line: str, answer: str) -> str:
    columns = line.lstrip("\t").split("\t")
    return format_row([*map(unescape, columns), answer])


# --- JSON


class _Form(NamedTuple):
    """How an object names its list of messages, and a message its role and its text."""

    messages: str
    role: str
    text: str
    responder: str  # a role
    speakers: dict[str, int]  # of all roles


_FORMS = (
    _Form("messages", "role", "content", "assistant", SPEAKERS),
    _Form("conversations", "from", "value", "gpt", SHAREGPT_SPEAKERS),
)


def _message_turns(line: str, place: str, is_prompt: bool) -> list[TextTurn]:
    form, messages = _find_messages(line, place)
    field = f"{place}: {form.messages}"
    turns = [_message_turn(message, form, f"{field}[{i}]") for i, message in enumerate(messages)]
    wanted = 1 if is_prompt else 2
    if len(turns) < wanted:
        raise UserError(f"{field}: found {len(turns)}; wanted {wanted} or more")
    if not is_prompt and turns[-1][0] != form.speakers[form.responder]:
        raise UserError(
            f"{field}[{len(turns) - 1}].{form.role}: found {messages[-1][form.role]!r}; "
            f"wanted {form.responder!r}, the response last"
        )
    return turns


def _answered_messages(line: str, answer: str) -> str:
    """The line with one message more; it keeps its form, its roles and its other keys."""
    values = json.loads(line)
    (form,) = (form for form in _FORMS if form.messages in values)
    values[form.messages].append({form.role: form.responder, form.text: answer})
    # Keys that nobody checked may hold half a surrogate pair: it becomes its escape again.
    return json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


def _find_messages(line: str, place: str) -> tuple[_Form, list[Any]]:
    """The form of an object, and its messages, which are not checked yet."""
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


def _message_turn(message: Any, form: _Form, field: str) -> TextTurn:
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


TSV = Format("TSV", (".tsv",), filled_lines, _row_turns, _answered_row)
JSON = Format("JSON", (".jsonl",), filled_lines, _message_turns, _answered_messages)
FORMATS = (TSV, JSON)
