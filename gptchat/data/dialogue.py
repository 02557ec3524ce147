"""THE chat format: turns -> token ids, token types, targets; truncation; TSV rows. Nothing else knows it.

A dialogue is a list of turns (speaker, text), the last one the response; speaker 1 is the responder, 0 the other:

    earlier [SEP] context [SEP] response [CLS]

Each turn after the first follows a `[SEP]`; a turn and its `[SEP]` have the speaker as token type. The model sees
everything but the final `[CLS]`, which is a target only: the response ends here. A prompt ends with the type-1 `[SEP]`.
Too long: the oldest turns go first; then the front of the context, which keeps half of the window if it needs it; then
the response is cut at its end, and has no `[CLS]`, since it did not end there.

A TSV row holds the turns of one dialogue, oldest first; speakers alternate backwards from the last column, the
response. Inside a turn a tab is written `\\t`, a line feed `\\n`, a carriage return `\\r`, a backslash `\\\\`; before
anything else a backslash stands for itself. Empty columns in front are skipped (rows of a table with shorter history).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptchat.console import UserError

Turn = tuple[int, Sequence[int]]  # (speaker, token ids)
SPEAKERS = {"assistant": 1, "user": 0, "system": 0, "developer": 0}  # OpenAI's roles
IGNORE = -100  # no target at this position
_WRITTEN = {"\t": r"\t", "\n": r"\n", "\r": r"\r", "\\": r"\\"}
_MEANT = {written: character for character, written in _WRITTEN.items()}


@dataclass(frozen=True)
class Example:
    """One dialogue as arrays (T,), T <= n_ctx: `targets[i]` is the id that follows `input_ids[i]`, or -100."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    targets: np.ndarray


def fit(lengths: Sequence[int], n_ctx: int) -> tuple[int, int, int]:
    """What is kept of turns of these lengths: (first turn, tokens cut from its front, input tokens T <= n_ctx).

    Takes no ids, so that batches can be planned from lengths alone. Needs a context and a response.
    """
    *_, context, response = lengths
    first, total = len(lengths) - 2, context + 1 + response
    while first and total + 1 + lengths[first - 1] <= n_ctx:
        first -= 1
        total += 1 + lengths[first]
    cut = min(max(total - n_ctx, 0), max(context - n_ctx // 2, 0))
    return first, cut, min(total - cut, n_ctx)


def _joined(turns: Sequence[Turn], sep_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and types of all turns, a `[SEP]` before each."""
    lengths = np.array([len(ids) + 1 for _, ids in turns])
    ids = np.concatenate([part for _, turn in turns for part in ([sep_id], turn)]).astype(np.int64)
    return ids, np.repeat(np.array([speaker for speaker, _ in turns]), lengths)


def encode_example(
    turns: Sequence[Turn], cls_id: int, sep_id: int, n_ctx: int, targets: str = "response"
) -> Example:
    """A training example of two turns or more. Targets are the response and `[CLS]`, or every token for "all"."""
    first, cut, length = fit([len(ids) for _, ids in turns], n_ctx)
    ids, types = _joined(turns[first:], sep_id)
    ids, types = np.append(ids, cls_id)[1 + cut :], types[1 + cut :]
    following = ids[1 : length + 1].copy()
    if targets == "response":
        following[: len(types) - len(turns[-1][1]) - 1] = IGNORE
    return Example(ids[:length], types[:length], following)


def encode_prompt(
    turns: Sequence[Turn], beginning: Sequence[int], cls_id: int, sep_id: int, room: int
) -> tuple[list[int], list[int]]:
    """(input_ids, token_type_ids) of the turns so far and the response's first tokens, `room` ids at most.

    The oldest turns go first. Raises UserError if the last turn and the beginning alone do not fit.
    """
    turns = turns or [(0, [])]
    first, total = len(turns), len(beginning)
    while first and (longer := total + len(turns[first - 1][1]) + 1) <= room:
        first, total = first - 1, longer
    if first == len(turns):
        raise UserError(f"prompt: the last turn takes {longer} tokens; wanted {room} at most")
    ids, types = _joined([*turns[first:], (1, beginning)], sep_id)
    return ids[1:].tolist(), types[1:].tolist()


def escape(text: str) -> str:
    """A turn as it is written in a TSV column."""
    return re.sub(r"[\t\n\r\\]", lambda match: _WRITTEN[match[0]], text)


def unescape(column: str) -> str:
    """The turn that a TSV column stands for; the inverse of `escape`."""
    return (
        re.sub(r"\\[tnr\\]", lambda match: _MEANT[match[0]], column) if "\\" in column else column
    )


def read_rows(path: str | Path, least: int = 2) -> Iterator[list[str]]:
    """The turns of every row, `least` or more, unescaped; no empty lines. UserErrors name the line or byte."""
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: byte {offset + error.start}: found invalid UTF-8 in line {number}"
                ) from None
            offset += len(raw)
            if not line:
                continue
            columns = line.lstrip("\t").split("\t")
            if len(columns) < least or not all(columns):
                found = (
                    "one column"
                    if len(columns) < least
                    else f"an empty column {columns.index('') + 1}"
                )
                raise UserError(
                    f"{path}:{number}: found {found}; wanted turns divided by tabs, the response last"
                )
            yield [unescape(column) for column in columns]


def alternate(texts: Sequence[str], last_speaker: int = 1) -> list[tuple[int, str]]:
    """(speaker, text) of each turn: the speakers alternate backwards from the last one."""
    n = len(texts)
    return [((last_speaker + n - 1 - i) % 2, text) for i, text in enumerate(texts)]


def format_row(turns: Sequence[str]) -> str:
    """The TSV line of a dialogue's turns; the inverse of what `read_rows` does with a line."""
    return "\t".join(escape(turn) for turn in turns) + "\n"
