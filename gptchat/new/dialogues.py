"""What a ChatLM learns of a person's dialogues, and what it is asked at the end: from a sample."""

from collections.abc import Sequence
from itertools import islice

from gptchat.data.dialogue import TextTurn
from gptchat.data.dialogue_files import read_dialogues
from gptchat.files import matching_files

ROWS = 1000  # of the sample
FILES = 10  # that it is taken from, at most
CONVERSATION = 4  # turns of a row, on average, from which on rows are conversations
REPEATED = 0.2  # share of repeated turns from which on rows show one conversation several times
PROMPTS = 10  # that a new ChatLM answers, at most
SHORT = 80  # characters of a prompt
Dialogue = list[TextTurn]


def sample(patterns: Sequence[str]) -> list[Dialogue]:
    """The first dialogues of the files: ROWS of one file, or as many of up to FILES together.

    Raises UserError for a line that is no dialogue.
    """
    paths = matching_files(patterns)
    chosen = paths[:: max(1, -(-len(paths) // FILES))]  # rounded up
    dialogues: list[Dialogue] = []
    for path in chosen:
        dialogues += islice(read_dialogues(path), ROWS // len(chosen))
    return dialogues


def choose_targets(dialogues: Sequence[Dialogue], has_lm: bool) -> tuple[str, str]:
    """([data] targets, the reason); `has_lm` says whether the ChatLM starts from an LM.

    Rows that show one conversation at different turns, such as a program's log of all messages so
    far, repeat turns. Each turn would be learned several times, so only their last one is.
    """
    n_turns = sum(map(len, dialogues)) / max(1, len(dialogues))
    # First turns may repeat: many conversations begin with the same greeting or system message.
    texts = [text for turns in dialogues for _, text in turns[1:]]
    repeated = 1 - len(set(texts)) / max(1, len(texts))
    figures = f"rows have {n_turns:.1f} turns, {100 * repeated:.0f} % repeat others"
    if has_lm:
        return ("response" if repeated >= REPEATED else "responder"), figures
    if repeated < REPEATED and n_turns >= CONVERSATION:
        return "turns", f'{figures}. "all": the first, too, but long rows are cut'
    return "all", "without an LM before it, it learns from every token"


def opening(turns: Dialogue) -> str:
    """What the responder answers first; empty if the responder speaks first."""
    text = ""
    for speaker, spoken in turns:
        if speaker == 1:
            break
        text = spoken
    return text


def choose_prompts(dialogues: Sequence[Dialogue]) -> list[str]:
    """Up to PROMPTS short openings, spread over the dialogues; if none is short the shortest."""
    openings = list(dict.fromkeys(filter(None, map(opening, dialogues))))
    short = [text for text in openings if len(text) <= SHORT] or sorted(openings, key=len)[:1]
    n = min(PROMPTS, len(short))
    return [short[i * len(short) // n] for i in range(n)]
