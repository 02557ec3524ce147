r"""Files of dialogues: the formats TSV and JSON, read into turns and written with an answer.

TSV. A line is a dialogue, a column a turn, the last one the response. In a turn a tab is written
`\t`, a line feed `\n`, a carriage return `\r` and a backslash `\\`; any other backslash is itself.
Empty columns at the front of a row are skipped, so that a table may hold histories of different
lengths. No other column may be without text.

JSON. A line, or an item of one array, is a dialogue in OpenAI's or in ShareGPT's form:

    {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]}
    {"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."}]}

Each message has text and one of the roles in SPEAKERS or SHAREGPT_SPEAKERS, which need not
alternate. In training the last message is the response, so it must be the responder's ("assistant"
or "gpt"). A message with `"weight": 0` or `"train": false` is not learned; if no response is, the
dialogue is passed over. A row's `system` is a first turn. Other keys are ignored. Answers to an
array's dialogues are written as lines.

A file is JSON if it begins so (json_files.py), or if its name ends in `.jsonl` or `.json`, with or
without `.gz`. Else it is TSV. Empty lines are skipped; a NUL is an error.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptchat.console import UserError
from gptchat.data.dialogue import SPEAKERS, UNLEARNED, TextTurn, alternate
from gptchat.data.json_files import (
    check_characters,
    has_texts,
    is_json,
    json_entries,
    parse_object,
    read_texts,
    show,
)
from gptchat.data.reading import filled_lines, read_text

SHAREGPT_SPEAKERS = {"gpt": 1, "human": 0, "system": 0}
_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r", "\\": r"\\"}  # character -> its escape
_CHARACTERS = {escaped: character for character, escaped in _ESCAPES.items()}


@dataclass(frozen=True)
class Format:
    """How files of dialogues are read, and written with answers.

    `entries(path)` yields (line number, dialogue as the file has it). `turns(entry, place,
    is_prompt)` are its turns; the last one is the response, or with `is_prompt` what is to be
    answered. There are none if nothing is to be learned. It raises UserError, which begins with
    `place`, for what is no dialogue. `answered(entry, answer)` is the entry with an answer.
    `unread_keys(entry)` names what `turns` ignores.
    """

    endings: tuple[str, ...]  # of file names, `.gz` apart
    entries: Callable[[str | Path], Iterator[tuple[int, str]]]
    turns: Callable[[str, str, bool], list[TextTurn]]
    answered: Callable[[str, str], str]
    unread_keys: Callable[[str], list[str]]


class Prompt(NamedTuple):
    """A dialogue that is to be answered."""

    place: str  # FILE:LINE
    turns: list[TextTurn]
    entry: str  # as the file has it


def format_of(path: str | Path) -> Format:
    return JSON if is_json(path) else format_named(path) or TSV


def format_named(path: str | Path) -> Format | None:
    """The format that a file's ending names, if it names one."""
    name = str(path).lower().removesuffix(".gz")
    return next((format for format in FORMATS if name.endswith(format.endings)), None)


def read_dialogues(path: str | Path) -> Iterator[list[TextTurn]]:
    """The turns of every dialogue of a file, the response last.

    Raises UserError that names the line, in JSON also the field, of what is no dialogue.
    """
    format = format_of(path)
    for number, entry in format.entries(path):
        turns = format.turns(entry, f"{path}:{number}", False)
        if turns:
            yield turns


def read_prompts(path: str | Path) -> Iterator[Prompt]:
    """The dialogues of a file that are to be answered, whoever speaks last."""
    format = format_of(path)
    for number, entry in format.entries(path):
        place = f"{path}:{number}"
        yield Prompt(place, format.turns(entry, place, True), entry)


def texts_of(path: str | Path) -> Iterator[str]:
    """The text that a vocabulary is trained on: the turns of dialogues, else pieces of a file.

    A file is one of dialogues if its ending names their format, or if it is JSON without texts.
    """
    if is_json(path) and has_texts(path):
        yield from read_texts(path)
    elif is_json(path) or format_named(path):
        for prompt in read_prompts(path):
            yield "\n".join(text for _, text in prompt.turns)
    else:
        yield from read_text(path)


# --- TSV


def escape(text: str) -> str:
    return re.sub(r"[\t\n\r\\]", lambda match: _ESCAPES[match[0]], text)


def unescape(column: str) -> str:
    """The inverse of `escape`."""
    return re.sub(r"\\[tnr\\]", lambda match: _CHARACTERS[match[0]], column)


def format_row(turns: Sequence[str]) -> str:
    return "\t".join(map(escape, turns)) + "\n"


def _row_turns(line: str, place: str, is_prompt: bool) -> list[TextTurn]:
    turns = [unescape(column) for column in line.lstrip("\t").split("\t")]
    if len(turns) < (1 if is_prompt else 2):
        problem = "one column"
    elif "\0" in line:
        problem = "a NUL character"
    elif not all(map(str.strip, turns)):
        blank = next(number for number, turn in enumerate(turns, 1) if not turn.strip())
        problem = f"no text in column {blank}"
    else:
        return alternate(turns, SPEAKERS["user" if is_prompt else "assistant"])
    raise UserError(f"{place}: found {problem}; wanted turns divided by tabs, the response last")


def _answered_row(line: str, answer: str) -> str:
    columns = line.lstrip("\t").split("\t")
    return format_row([*map(unescape, columns), answer])


# --- JSON


class _Form(NamedTuple):
    """The keys of a row's messages and of a message's role and text, and the roles."""

    messages: str
    role: str
    text: str
    responder: str
    speakers: dict[str, int]


_FORMS = (
    _Form("messages", "role", "content", "assistant", SPEAKERS),
    _Form("conversations", "from", "value", "gpt", SHAREGPT_SPEAKERS),
)


def _form_of(values: dict[str, Any], place: str) -> _Form:
    forms = [form for form in _FORMS if form.messages in values]
    if len(forms) != 1:
        problem = "both keys" if forms else "neither key"
        raise UserError(f"{place}: found {problem}; wanted messages or conversations")
    return forms[0]


def _message_turns(line: str, place: str, is_prompt: bool) -> list[TextTurn]:
    values = parse_object(line, place, "messages or conversations")
    form = _form_of(values, place)
    messages = values[form.messages]
    field = f"{place}: {form.messages}"
    if not isinstance(messages, list):
        raise UserError(f"{field}: found {show(messages)}; wanted a list of messages")
    turns = [_message_turn(message, form, f"{field}[{i}]") for i, message in enumerate(messages)]
    wanted = 1 if is_prompt else 2
    if len(turns) < wanted:
        raise UserError(f"{field}: found {len(turns)}; wanted {wanted} or more")
    if not is_prompt and turns[-1][0] % UNLEARNED != 1:
        raise UserError(
            f"{field}[{len(turns) - 1}].{form.role}: found {messages[-1][form.role]!r}; "
            f"wanted {form.responder!r}, the response last"
        )
    system = values.get("system") or ""
    if not isinstance(system, str):
        raise UserError(f"{place}: system: found {show(system)}; wanted some text")
    if system.strip():
        turns.insert(0, (0, check_characters(system, f"{place}: system")))
    if is_prompt:
        return [(speaker % UNLEARNED, text) for speaker, text in turns]
    learned = [i for i, (speaker, _) in enumerate(turns) if speaker == 1 and i > 0]
    return turns[: learned[-1] + 1] if learned else []


def _message_turn(message: Any, form: _Form, field: str) -> TextTurn:
    if not isinstance(message, dict):
        wanted = f"an object with {form.role} and {form.text}"
        raise UserError(f"{field}: found {show(message)}; wanted {wanted}")
    role, text = message.get(form.role), message.get(form.text)
    if not isinstance(role, str) or role not in form.speakers:
        wanted = f"one of {', '.join(form.speakers)}"
        raise UserError(f"{field}.{form.role}: found {show(role)}; wanted {wanted}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{field}.{form.text}: found {show(text)}; wanted some text")
    check_characters(text, f"{field}.{form.text}")
    weight, train = message.get("weight", 1), message.get("train", True)
    if weight not in (0, 1):
        raise UserError(f"{field}.weight: found {show(weight)}; wanted 0 or 1")
    if not isinstance(train, bool):
        raise UserError(f"{field}.train: found {show(train)}; wanted true or false")
    return form.speakers[role] + (0 if weight and train else UNLEARNED), text


def _unread_keys(line: str) -> list[str]:
    values = json.loads(line)
    form = _form_of(values, "")
    read = {form.role, form.text, "weight", "train"}
    inside = {key for message in values[form.messages] for key in message.keys() - read}
    return [
        *(values.keys() - {form.messages, "system"}),
        *(f"{form.messages}[].{key}" for key in inside),
    ]


def _answered_messages(line: str, answer: str) -> str:
    values = json.loads(line)
    form = _form_of(values, "")
    values[form.messages].append({form.role: form.responder, form.text: answer})
    # Keys that nobody checked may hold half a surrogate pair: it becomes its escape again.
    return json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


TSV = Format((".tsv",), filled_lines, _row_turns, _answered_row, lambda entry: [])
JSON = Format((".jsonl", ".json"), json_entries, _message_turns, _answered_messages, _unread_keys)
FORMATS = (TSV, JSON)
