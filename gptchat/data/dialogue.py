"""THE chat format: turns to token ids, token types and targets; truncation; speakers.

A dialogue is a list of turns, oldest first. A turn is (speaker, token ids), or (speaker, text)
before it is encoded. Speaker 1 is the responder, speaker 0 everybody else. In training the last
turn is the response, the one before it the context, and any turns before those are history:

    history [SEP] context [SEP] response [CLS]

Each turn after the first has a `[SEP]` before it. The token type of a turn and its `[SEP]` is its
speaker. A prompt ends with the type-1 `[SEP]` or, to continue a response, with that response's
first tokens.

Targets are the response and `[CLS]`, which means that the response is complete and is never an
input. With targets = "responder" the earlier turns of speaker 1 are targets, too, except a first
turn, which answers nothing; with "turns" those of both speakers. After the last token of such a
turn the target is `[CLS]`, although the next input is `[SEP]`. With "all" every token after the
first is a target, `[SEP]`s included, and `[CLS]` only at the end.

A training example longer than `n_ctx` input tokens is truncated in this order:
1. History turns are dropped whole, oldest first.
2. The front of the context is cut, down to `n_ctx // 2` tokens.
3. The end of the response is cut. Then `[CLS]` is no target, since the response did not end there.
With targets = "responder" or "turns" a long dialogue is first cut into examples, in which each of
the responder's turns but a first one is a target once. An example takes as many turns as fit and
ends with one of the responder's; the next begins with that turn, as history.
A prompt loses whole turns, oldest first, but never its last one.

OpenAI's role "assistant" is speaker 1; "user", "system" and "developer" are speaker 0. Turns
without roles, as in a TSV row, alternate backwards from the response. UNLEARNED is added to the
speaker of a turn of which no token is to be a target. The last turn is always learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import numpy as np

from gptchat.console import UserError

Turn = tuple[int, Sequence[int]]  # (speaker, token ids)
TextTurn = tuple[int, str]  # (speaker, text)
SPEAKERS = {"assistant": 1, "user": 0, "system": 0, "developer": 0}  # of OpenAI's roles
UNLEARNED = 2  # added to the speaker of a turn that is not to be learned
IGNORE = -100  # the target of a position that has none
# The same layout as a Jinja template, without token types, for transformers' `apply_chat_template`.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['assistant', 'user', 'system', 'developer']"
    " or message['content'] is not string %}"
    "{{ raise_exception('wanted messages of assistant, user, system or developer, as text') }}"
    "{% endif %}"
    "{% if not loop.first %}[SEP]{% endif %}{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}[SEP]"
    "{% elif messages[-1]['role'] == 'assistant' %}[CLS]{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """One dialogue as int64 arrays (T,), T <= n_ctx.

    `targets[i]` is the id that follows `input_ids[i]`, or IGNORE.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    targets: np.ndarray


class Truncation(NamedTuple):
    """What is kept of a training example that has to fit."""

    first_turn: int  # index of the oldest turn that is kept
    skipped: int  # tokens cut from the front of that turn
    length: int  # input tokens that are left, T <= n_ctx


def fit(lengths: Sequence[int], n_ctx: int) -> Truncation:
    """How two or more turns of `lengths` tokens are truncated to `n_ctx` input tokens."""
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
    """Ids and token types of all turns, a `[SEP]` before each: two int64 arrays (T,)."""
    ids: list[int] = []
    types: list[int] = []
    for speaker, turn in turns:
        ids.append(sep_id)
        ids.extend(turn)
        types += [speaker % UNLEARNED] * (1 + len(turn))
    return np.array(ids, np.int64), np.array(types, np.int64)


def excerpts(
    lengths: Sequence[int], speakers: Sequence[int], n_ctx: int, targets: str
) -> list[tuple[int, int]]:
    """The turns, first..last-1, of each training example of a dialogue longer than `n_ctx`.

    Turn i has `lengths[i]` tokens. `fit` then truncates each example.
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
    """Input tokens of turns of `lengths` tokens, with the `[SEP]`s between them."""
    return sum(lengths) + len(lengths) - 1


def encode_example(
    turns: Sequence[Turn], cls_id: int, sep_id: int, n_ctx: int, targets: str = "response"
) -> Example:
    """A training example of two turns or more, truncated to `n_ctx` input tokens."""
    first_turn, skipped, length = fit([len(ids) for _, ids in turns], n_ctx)
    kept = turns[first_turn:]
    ids, types = _concatenate(kept, sep_id)
    if targets == "all":
        following = np.append(ids[1:], cls_id)
        is_unlearned = [speaker >= UNLEARNED for speaker, _ in kept]
        following[np.repeat(is_unlearned, [1 + len(turn) for _, turn in kept])] = IGNORE
    else:
        following = np.full(len(ids), IGNORE, np.int64)
        end = 0
        for i, (speaker, turn) in enumerate(kept):
            start, end = end, end + 1 + len(turn)  # of the turn behind its [SEP]
            is_chosen = targets == "turns" or (targets == "responder" and speaker == 1)
            if i == len(kept) - 1 or (i > 0 and is_chosen and speaker < UNLEARNED):
                following[start:end] = [*turn, cls_id]
    start = 1 + skipped  # the first turn has no [SEP] before it
    stop = start + length
    return Example(ids[start:stop], types[start:stop], following[start:stop])


def encode_prompt(
    turns: Sequence[Turn], beginning: Sequence[int], sep_id: int, max_length: int
) -> tuple[list[int], list[int]]:
    """(input_ids, token_type_ids) of a prompt that ends with the `beginning` of the response.

    The oldest turns are dropped until at most `max_length` ids are left. Raises UserError if the
    last turn and the beginning are longer.
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
    """(speaker, text) of each turn, with speakers that alternate back from the last one."""
    first_speaker = (last_speaker + len(texts) - 1) % 2
    return list(zip(cycle((first_speaker, 1 - first_speaker)), texts, strict=False))
