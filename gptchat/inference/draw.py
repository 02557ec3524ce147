"""Logits (B, V) -> next ids, each row with its own settings (`sampling.py`) and its own noise.

The settings apply in this order: logit bias; repetition penalty, frequency and presence penalty;
filtered words, stop ids before `min_tokens`; then, unless greedy, temperature, top-k, top-p, min-p.
(Where scores tie at the cut, top-k keeps k ids and top-p all that tie.)

Given its logits, a row's id does not depend on the other rows. Its noise is one number in [0, 1), a
hash of (seed, candidate, position), which becomes an id by inverting the cumulative distribution.
Probabilities become integer weights (WEIGHT_OF_THE_BEST for the likeliest id), so their sums are
exact in any order on any device, and an id of weight 0 is never drawn.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from hashlib import blake2b
from math import inf, log
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptchat.inference.sampling import Row, Sampling
from gptchat.inference.text import BROKEN, CharacterFilter

WEIGHT_OF_THE_BEST = 2.0**40  # 2**23 ids of that weight still fit into an int64


class Scored(NamedTuple):
    """An id, the model's log-probability of it (before any setting), and the k best ids.

    `top` has each of these with its log-probability, best first. `logprob` is None for the first
    token of a prompt, and where log-probabilities were not asked for.
    """

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


def draw(
    logits: Tensor,
    rows: Sequence[Row],
    suppress: Tensor,
    characters: CharacterFilter | None = None,
) -> list[Scored]:
    """The next id of each row, -1 where nothing is left to draw. OVERWRITES float32 logits (B, V).

    `suppress` (S,) are ids that are never drawn. Without `characters`, `whole_characters` has no
    effect.
    """
    to_score = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    untouched = logits[to_score]  # a copy
    scores = logits.float()  # a copy only if they are not float32
    penalize_and_ban(scores, rows, suppress)
    if characters:
        keep_characters_whole(scores, rows, characters)
    ids = choose(scores, rows)  # (B,)
    drawn = [Scored(token) for token in ids.tolist()]
    if to_score:
        n_top = [rows[i].sampling.logprobs or 0 for i in to_score]
        all_scored = score(untouched, ids[to_score].clamp_min(0), max(n_top))
        for i, k, scored in zip(to_score, n_top, all_scored, strict=True):
            drawn[i] = Scored(drawn[i].token, scored.logprob, scored.top[:k])
    return drawn


def score(logits: Tensor, ids: Tensor, k: int) -> list[Scored]:
    """The log-probability of ids (N,) under logits (N, V), and the k best of each row."""
    logprobs = logits.float().log_softmax(-1)  # (N, V)
    top_logprobs, top_ids = logprobs.topk(min(k, logits.shape[1]))  # (N, k)
    of_ids = logprobs.gather(1, ids[:, None])  # (N, 1)
    # One table, because a GPU is waited for once for each copy. float64 holds every id.
    columns = (ids[:, None], of_ids, top_ids, top_logprobs)
    table = torch.cat([column.double() for column in columns], dim=1).tolist()
    scored = []
    for token, logprob, *top in table:
        n = len(top) // 2
        best_ids = map(int, top[:n])
        scored.append(Scored(int(token), logprob, list(zip(best_ids, top[n:], strict=True))))
    return scored


def penalize_and_ban(scores: Tensor, rows: Sequence[Row], suppress: Tensor) -> None:
    """In place: what the settings of each row change in its scores (B, V) before it is drawn.

    -inf stands for what may not be drawn: suppressed ids, those that a filter forbids, and stop ids
    before `min_tokens`.
    """
    scores.index_fill_(1, suppress, -inf)
    add_biases(scores, rows)
    penalize_repetition(scores, rows)
    penalize_answered(scores, rows)
    ban(scores, rows)


class Entries:
    """Entries of the scores (B, V) that one operation changes together, collected row by row.

    Each has a number of its own, such as a penalty. However many rows they are in, they take two
    copies to a GPU.
    """

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.numbers: list[np.ndarray] = []

    def add(self, row: int, ids: Collection[int], numbers: float | list[float] = 0.0) -> None:
        """Add entries of a row, with a number for each, or one for all."""
        self.rows.append(np.full(len(ids), row))
        self.ids.append(np.fromiter(ids, np.int64, len(ids)))
        self.numbers.append(np.broadcast_to(np.array(numbers, np.float32), len(ids)))

    def place(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and ids of all entries (N,), as an index into the scores."""
        index = np.stack([np.concatenate(self.rows), np.concatenate(self.ids)])
        rows, ids = torch.from_numpy(index).to(scores.device)
        return rows, ids

    def values(self, scores: Tensor) -> Tensor:
        """Their numbers (N,)."""
        return torch.from_numpy(np.concatenate(self.numbers)).to(scores.device)


def add_biases(scores: Tensor, rows: Sequence[Row]) -> None:
    """In place: `logit_bias` is added."""
    biased = Entries()
    for i, row in enumerate(rows):
        biases = row.sampling.logit_bias
        if biases:
            biased.add(i, biases, list(biases.values()))
    if biased.ids:
        scores[biased.place(scores)] += biased.values(scores)


def penalize_repetition(scores: Tensor, rows: Sequence[Row]) -> None:
    """In place: positive scores of ids in prompt or answer are divided, others multiplied.

    Keskar et al., "CTRL" (2019).
    """
    seen = Entries()
    for i, row in enumerate(rows):
        if row.sampling.repetition_penalty != 1:
            seen.add(i, row.ids, row.sampling.repetition_penalty)
    if seen.ids:
        place, penalties = seen.place(scores), seen.values(scores)
        old = scores[place]
        # An id that was seen twice gets the same score twice.
        scores[place] = torch.where(old < 0, old * penalties, old / penalties)


def penalize_answered(scores: Tensor, rows: Sequence[Row]) -> None:
    """In place: an id that the answer has had c times loses c * frequency + presence penalty.

    The formula is that of OpenAI's API reference. The prompt does not count.
    """
    answered = Entries()
    for i, row in enumerate(rows):
        frequency, presence = row.sampling.frequency_penalty, row.sampling.presence_penalty
        if frequency or presence:
            counts = Counter(row.ids[row.n_prompt :])
            penalties = [count * frequency + presence for count in counts.values()]
            answered.add(i, counts, penalties)
    if answered.ids:
        scores[answered.place(scores)] -= answered.values(scores)


def ban(scores: Tensor, rows: Sequence[Row]) -> None:
    """In place: -inf for what a row's word filter forbids, and stop ids before `min_tokens`."""
    banned = Entries()
    for i, row in enumerate(rows):
        if row.sampling.word_filter:
            banned.add(i, row.sampling.word_filter.banned(row.ids))
        least = row.sampling.min_tokens
        if least and len(row.ids) - row.n_prompt < least:
            banned.add(i, row.stop_ids)
    if banned.ids:
        scores[banned.place(scores)] = -inf


def keep_characters_whole(scores: Tensor, rows: Sequence[Row], characters: CharacterFilter) -> None:
    """In place: -inf for ids that would break a character, in rows that want none broken."""
    states = [
        characters.state(row.ids) if row.sampling.whole_characters else BROKEN for row in rows
    ]
    if not any(states):  # as a rule all are between characters: a tenth of the time
        scores.index_fill_(1, characters.forbidden_between, -inf)
    else:
        scores.masked_fill_(characters.forbidden[states], -inf)


def choose(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """An id (B,) of each row, the best where the temperature is 0; -1 where all scores are -inf.

    OVERWRITES `scores` (B, V). Rows are drawn together where their settings allow it.
    """
    none_left = ~scores.amax(-1, keepdim=True).isfinite()  # (B, 1)
    ids = torch.empty(none_left.shape, dtype=torch.int64, device=scores.device)
    greedy: list[int] = []
    by_top_k: dict[int, list[int]] = {}  # top_k -> rows
    for i, row in enumerate(rows):
        if row.sampling.temperature == 0:
            greedy.append(i)
        else:
            by_top_k.setdefault(row.sampling.top_k, []).append(i)
    if greedy:
        place = row_index(greedy, len(rows))
        ids[place] = scores[place].max(-1, True).indices  # a third of the time of `argmax`
    for top_k, group in by_top_k.items():
        place = row_index(group, len(rows))
        ids[place] = sample(scores[place], top_k, [rows[i] for i in group])
    return ids.masked_fill_(none_left, -1)[:, 0]


def row_index(numbers: list[int], n_rows: int) -> list[int] | slice:
    """An index of these rows, ascending, out of `n_rows`; all of them are a slice, not a copy."""
    if len(numbers) == n_rows:
        return slice(None)
    return numbers


def sample(scores: Tensor, top_k: int, rows: Sequence[Row]) -> Tensor:
    """An id (R, 1) drawn from each row's `top_k` best, 0 for all. OVERWRITES `scores` (R, V)."""
    if top_k:
        scores, ids = scores.topk(min(top_k, scores.shape[1]))  # (R, K)
    cumulative = filtered_weights(scores, [row.sampling for row in rows]).cumsum(-1)  # (R, K)
    draws = [uniform(row.sampling.seed, row.candidate, len(row.ids)) for row in rows]
    noise = torch.tensor(draws, dtype=torch.float64, device=scores.device)[:, None]
    aim = (noise * cumulative[:, -1:]).long()  # less than the total, rounded too
    place = torch.searchsorted(cumulative, aim, right=True)  # (R, 1)
    place.clamp_max_(scores.shape[1] - 1)  # beyond the end where all is NaN
    if top_k:
        return ids.gather(1, place)
    return place


def uniform(seed: int, candidate: int, position: int) -> float:
    """A number in [0, 1) of 52 bits, by BLAKE2b: a pure function of the seed and the token's
    place.
    """
    key = f"{seed} {candidate} {position}".encode()
    digest = blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest) >> 12) * 2.0**-52


def filtered_weights(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Weights (R, K), int64, in proportion to the probabilities, 0 outside top-p and min-p.

    `scores` (R, K), float32, one row for each of `settings`, are what top-k has left of the logits:
    K is the vocabulary or the largest top-k, in any order, with -inf for what may not be drawn.
    They are OVERWRITTEN. A row without a score (all -inf, or a NaN) gets weights that mean nothing;
    `choose` gives such a row no id.
    """
    # The best score will be 0, so min-p's bound is its logarithm.
    numbers = [
        (max(s.temperature, 1e-30), log(s.min_p) if s.min_p else -inf, s.top_p) for s in settings
    ]
    columns = torch.tensor(numbers, dtype=torch.float64, device=scores.device)  # (R, 3)
    temperature, bound, top_p = columns.T[:, :, None]  # (R, 1) each
    scores.sub_(scores.amax(-1, keepdim=True)).div_(temperature.float())
    weights = scores.exp().mul_(WEIGHT_OF_THE_BEST)  # fractions are cut off below
    bound = bound.float()
    with_top_p = [i for i, s in enumerate(settings) if s.top_p < 1]
    if with_top_p:
        place = row_index(with_top_p, len(settings))
        bound[place] = nucleus(scores[place], top_p[place]).maximum(bound[place])
    if with_top_p or any(s.min_p for s in settings):
        # In place, `ge_` gives 0.0 and 1.0: a third of the time that a mask of bools takes.
        weights.mul_(scores.ge_(bound))
    return weights.long()


def nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """The lowest score (R, 1) of the smallest set of best ids with probability `top_p` (R, 1)."""
    if scores.is_cpu:  # numpy takes 0.1 ms for a row of 50,257, torch 3.5 ms
        ordered = torch.from_numpy(np.sort(scores.numpy()))
    else:
        ordered = scores.sort().values
    weights = ordered.exp().mul_(WEIGHT_OF_THE_BEST).long()
    cumulative = weights.cumsum(-1)  # the least probable first
    outside = ((1 - top_p) * cumulative[:, -1:]).long()  # what the set need not have
    place = torch.searchsorted(cumulative, outside, right=True)
    return ordered.gather(1, place.clamp_max_(scores.shape[1] - 1))
