r"""THE chat format: turns to token ids, token types and targets; truncation; speakers; files.

Every other module that touches a dialogue calls this one. A dialogue is a list of turns, oldest
first; a turn is (speaker, token ids), or (speaker, text) before it is encoded. Speaker 1 is the
responder, speaker 0 everybody else. In training the last turn is the response, the one before it
the context, and any turns before those are history:

    history [SEP] context [SEP] response [CLS]

Layout. Each turn after the first stands behind a `[SEP]`. The token type of a turn and of the
`[SEP]` before it is its speaker. A prompt has the same layout and ends with the type-1 `[SEP]` or,
to continue a response, with the first tokens of that response. `chat_template.py` renders the
same layout without token types.

Targets. With targets = "response" they are the response and `[CLS]`, which marks that the response
is complete and is never an input. With "responder" so is every earlier turn of speaker 1, except a
first turn, which answers nothing: after its last token the target is `[CLS]` although the next
input is `[SEP]`. With "turns" so are the turns of both speakers. With "all" every token after the
first is a target, `[SEP]`s included, and `[CLS]` at the end only.

Truncation of a training example to `n_ctx` input tokens, in this order:
1. History turns are dropped whole, oldest first, until the rest fits.
2. The front of the context is cut, down to `n_ctx // 2` tokens.
3. The end of the response is cut. Then `[CLS]` is no target: the response did not end there.
With targets = "responder" or "turns" a dialogue that is too long is first cut into examples, so
that each of the responder's turns but a first one is a target in exactly one of them. An example
takes as many turns as fit and ends with one of the responder's; the next begins with that turn, as
history. Only if a response and the turn before it are too long by themselves is something
truncated.
A prompt is truncated by dropping whole turns, oldest first; its last turn is never cut.

Speakers. OpenAI's role "assistant" is speaker 1; "user", "system" and "developer" are speaker 0.
Turns without roles, as in a TSV row, alternate backwards from the response, which is speaker 1's.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptchat.console import UserError
from gptchat.data.reading import Source, first_line, read_lines

Turn = tuple[int, Sequence[int]]  # (speaker, token ids)
TextTurn = tuple[int, str]  # (speaker, text)
SPEAKERS = {"assistant": 1, "user": 0, "system": 0, "developer": 0}  # of OpenAI's roles
SHAREGPT_SPEAKERS = {"gpt": 1, "human": 0, "system": 0}
IGNORE = -100  # the target of a position that has none
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


@dataclass(frozen=True)
class Example:
    """One dialogue as int64 arrays (T,), T <= n_ctx.

    `targets[i]` is the id that follows `input_ids[i]`, or IGNORE.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    targets: np.ndarray


class Prompt(NamedTuple):
    """A dialogue of a file that is to be answered."""

    place: str  # FILE:LINE
    turns: list[TextTurn]
    line: str  # as it stands in the file, without its end


class Truncation(NamedTuple):
    """What is kept of a training example that has to fit into `n_ctx` input tokens."""

    first_turn: int  # index of the oldest turn that is kept
    skipped: int  # tokens cut from the front of that turn
    length: int  # input tokens that are left, T <= n_ctx


def fit(lengths: Sequence[int], n_ctx: int) -> Truncation:
    """How turns of `lengths` tokens, two or more, are truncated to `n_ctx` input tokens.

    It takes lengths, not ids, so that batches can be planned without reading any token.
    """
    context, response = lengths[-2:]
    first_turn = len(lengths) - 2
    length = context + 1 + response  # 1: the [SEP] between them
    while first_turn > 0:
        with_earlier_turn = lengths[first_turn - 1] + 1 + length
        if with_earlier_turn > n_ctx:
            break
        first_turn -= 1
        length = with_earlier_turn
    excess = max(length - n_ctx, 0)
    skipped = min(excess, max(context - n_ctx // 2, 0))
    return Truncation(first_turn, skipped, min(length - skipped, n_ctx))


def _concatenate(turns: Sequence[Turn], sep_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and token types of all turns, each behind a `[SEP]`: two int64 arrays (T,)."""
    ids: list[int] = []
    types: list[int] = []
    for speaker, turn in turns:
        ids.append(sep_id)
        ids.extend(turn)
        types += [speaker] * (1 + len(turn))
    return np.array(ids, np.int64), np.array(types, np.int64)


def excerpts(
    lengths: Sequence[int], speakers: Sequence[int], n_ctx: int, targets: str
) -> list[tuple[int, int]]:
    """Which turns, first..last-1, of a dialogue longer than `n_ctx` stand in each training example.

    `lengths` are the turns' tokens, `speakers` their speakers. It is one example of all turns,
    which `fit` truncates, but with targets = "responder" or "turns" as many as the module's
    docstring says.
    """
    if targets not in ("responder", "turns"):
        return [(0, len(lengths))]
    answers = [i for i, speaker in enumerate(speakers) if speaker == 1 and i > 0]
    parts: list[tuple[int, int]] = []
    first = 0
    last = 0  # one past the last answer of the example being built; 0: it has none yet
    for answer in answers:
        if last and input_length(lengths[first : answer + 1]) > n_ctx:
            parts.append((first, last))
            first = last - 1
        last = answer + 1
        while first < answer - 1 and input_length(lengths[first:last]) > n_ctx:
            first += 1
    parts.append((first, last))
    return parts


def input_length(lengths: Sequence[int]) -> int:
    """Input tokens of turns of `lengths` tokens, with the [SEP]s between them."""
    return sum(lengths) + len(lengths) - 1


def encode_example(
    turns: Sequence[Turn], cls_id: int, sep_id: int, n_ctx: int, targets: str = "response"
) -> Example:
    """A training example of two turns or more, truncated to `n_ctx` input tokens.

    `targets` is one of [data] targets: see the module's docstring.
    """
    first_turn, skipped, length = fit([len(ids) for _, ids in turns], n_ctx)
    kept = turns[first_turn:]
    ids, types = _concatenate(kept, sep_id)
    if targets == "all":
        following = np.append(ids[1:], cls_id)
    else:
        following = np.full(len(ids), IGNORE, np.int64)
        end = 0
        for i, (speaker, turn) in enumerate(kept):
            start, end = end, end + 1 + len(turn)  # of the turn behind its [SEP]
            is_chosen = targets == "turns" or (targets == "responder" and speaker == 1)
            if i == len(kept) - 1 or (i > 0 and is_chosen):
                following[start:end] = [*turn, cls_id]
    start = 1 + skipped  # the first turn has no [SEP] before it
    stop = start + length
    return Example(ids[start:stop], types[start:stop], following[start:stop])


def encode_prompt(
    turns: Sequence[Turn], beginning: Sequence[int], sep_id: int, max_length: int
) -> tuple[list[int], list[int]]:
    """(input_ids, token_type_ids) from which the model continues the response after `turns`.

    `beginning` holds the response's first tokens; there may be none. The oldest turns are dropped
    until at most `max_length` ids are left. Raises UserError if the last turn and the beginning
    alone are longer.
    """
    if not turns:
        turns = [(0, [])]
    first_turn = len(turns)
    length = len(beginning)
    while first_turn > 0:
        with_earlier_turn = length + 1 + len(turns[first_turn - 1][1])
        if with_earlier_turn > max_length:
            break
        first_turn -= 1
        length = with_earlier_turn
    if first_turn == len(turns):
        raise UserError(
            f"prompt: the last turn takes {with_earlier_turn} tokens; wanted {max_length} at most"
        )
    ids, types = _concatenate([*turns[first_turn:], (1, beginning)], sep_id)
    return ids[1:].tolist(), types[1:].tolist()  # the first turn has no [SEP] before it


def alternate(texts: Sequence[str], last_speaker: int = 1) -> list[TextTurn]:
    """(speaker, text) of each turn: the speakers alternate backwards from the last one."""
    last = len(texts) - 1
    return [((last_speaker + last - i) % 2, text) for i, text in enumerate(texts)]


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
    turns = [unescape(column) for column in columns]
    blank = [number for number, turn in enumerate(turns, 1) if not turn.strip()]
    if len(columns) < min_turns:
        problem = "one column"
    elif "" in columns:
        problem = f"an empty column {columns.index('') + 1}"
    elif blank:
        problem = f"white space alone in column {blank[0]}"
    elif "\0" in line:
        problem = "a NUL character"
    else:
        return turns
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
