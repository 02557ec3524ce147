"""What a ChatLM learns of a person's dialogues, and what it is asked at the end: from a sample.

Whole conversations, one a row, are read in several examples where they are long (targets
"responder" and "turns", see data/dialogue.py), so that nothing of them is cut. Rows that show one
conversation at different turns, such as a program's log of all messages so far, are not: each turn
of them would be learned several times. Such rows, or those of two turns, give their last turn
alone; without an LM, every token.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from gptchat.data.dialogue import TextTurn
from gptchat.data.dialogue_files import JSON, format_of, read_dialogues
from gptchat.files import matching_files, split_repeats

ROWS = 1000  # of the sample
FILES = 10  # that it is taken from, at most
CONVERSATION = 4  # turns of a row, on average, from which on rows may be whole conversations
REPEATED = 0.2  # share of repeated turns from which on rows show one conversation several times
PROMPTS = 10  # that a new ChatLM answers, at most
SHORT = 80  # characters of a prompt
SYSTEM = 10  # dialogues
Dialogue = list[TextTurn]


class Targets(NamedTuple):
    """The value of [data] targets, and why."""

    value: str
    reason: str


def files_of(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns match, each once, without empty ones."""
    distinct, _ = split_repeats(chain.from_iterable(map(matching_files, patterns)))
    return [path for path in distinct if path.stat().st_size > 0]


def sample(patterns: Sequence[str]) -> list[Dialogue]:
    """The first dialogues of the files: ROWS of one file, or as many of up to FILES together.

    Raises UserError for a line that is no dialogue.
    """
    paths = files_of(patterns)
    stride = max(1, -(-len(paths) // FILES))  # rounded up
    chosen = paths[::stride]
    dialogues: list[Dialogue] = []
    for path in chosen:
        dialogues += islice(read_dialogues(path), ROWS // len(chosen))
    return dialogues


def turns_each(dialogues: Sequence[Dialogue]) -> float:
    return sum(map(len, dialogues)) / max(1, len(dialogues))


def repeated_share(dialogues: Sequence[Dialogue]) -> float:
    """The share of turns whose text was the text of an earlier turn.

    First turns do not count: many conversations begin alike, with a greeting or a system message.
    """
    texts = [text for turns in dialogues for _, text in turns[1:]]
    return 1 - len(set(texts)) / max(1, len(texts))


def choose_targets(patterns: Sequence[str], has_lm: bool) -> Targets:
    """What a ChatLM learns of own dialogues; `has_lm` says whether it starts from an LM."""
    dialogues = sample(patterns)
    n_turns = turns_each(dialogues)
    repeated = repeated_share(dialogues)
    have_roles = all(format_of(path) == JSON for path in files_of(patterns))
    are_short = n_turns < CONVERSATION
    are_whole = not are_short and repeated < REPEATED
    if not has_lm and are_whole:
        reason = f"every turn but a row's first; rows have {n_turns:.1f} on average"
        return Targets("turns", f'{reason}. "all": the first, too, but long rows are cut')
    if not has_lm:
        return Targets("all", "without an LM before it, it learns from every turn")
    if have_roles and (are_short or are_whole):
        return Targets("responder", 'every message of the assistant; "turns": of both')
    if are_whole:
        figures = f"{n_turns:.1f} turns each, {100 * repeated:.0f} % repeated"
        reason = f'rows are whole conversations ({figures}); "response": the last turn'
        return Targets("responder", reason)
    return Targets("response", 'rows may repeat earlier turns; "responder" learns those, too')


def opening(turns: Dialogue) -> str:
    """What the responder answers first: the first turn, or one behind a system message.

    Empty where the responder speaks first.
    """
    text = ""
    for speaker, spoken in turns:
        if speaker == 1:
            break
        text = spoken
    return text


def choose_prompts(dialogues: Sequence[Dialogue]) -> list[str]:
    """Up to PROMPTS short openings, spread over the dialogues; if none is short the shortest.

    One that begins a tenth of the dialogues, SYSTEM at least, may be a system message, and is left
    out where there are others.
    """
    counts = Counter(filter(None, map(opening, dialogues)))
    often = max(SYSTEM, len(dialogues) / 10)
    openings = [text for text, count in counts.items() if count < often] or list(counts)
    short = [text for text in openings if len(text) <= SHORT]
    if not short:
        return sorted(openings, key=len)[:1]
    n = min(PROMPTS, len(short))
    return [short[i * len(short) // n] for i in range(n)]
