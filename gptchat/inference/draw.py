"""Logits (B, V) -> next ids, each row with its own settings (`sampling.py`) and its own noise.

The settings apply in this order: logit bias; repetition penalty, frequency and presence penalty;
filtered words, stop ids before `min_tokens`; then, unless greedy, temperature, top-k, top-p, min-p.
(Where ids tie at the cut, top-k keeps k of them, top-p all whose float32 probabilities are equal.)

Given its logits, a row's id does not depend on the other rows. Its noise is one number in [0, 1), a
hash of (seed, candidate, position), which becomes an id by inverting the cumulative distribution.
If that id is outside of top-p, another number follows. An id that may not be drawn never is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptchat.inference.blocks import best, block_sums, draw_place
from gptchat.inference.sampling import Sampling
from gptchat.inference.text import BROKEN, CharacterFilter


@dataclass
class Row:
    """What a draw needs to know of a sequence: its settings, and its ids so far.

    The answer begins after `n_prompt` ids. A stop id would end it.
    """

    sampling: Sampling
    candidate: int  # its number among those of its request
    ids: list[int]
    n_prompt: int = 0
    stop_ids: Sequence[int] = ()


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

    However many rows they are in, they take one copy to a GPU.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ids: list[np.ndarray] = []

    def add(self, row: int, ids: Collection[int]) -> None:
        self.add_array(row, np.fromiter(ids, np.int64, len(ids)))

    def add_array(self, row: int, ids: np.ndarray) -> None:
        self.rows.append(row)
        self.ids.append(ids)

    def index(self) -> np.ndarray:
        """Rows and ids of all entries (2, N)."""
        return np.stack([self.each(self.rows), np.concatenate(self.ids)])

    def each(self, numbers: Sequence[float]) -> np.ndarray:
        """Numbers, one for each call of `add`, as one for each entry (N,)."""
        return np.repeat(numbers, [len(ids) for ids in self.ids])


def place(index: np.ndarray, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and ids (2, N) as an index into the scores."""
    rows, ids = torch.from_numpy(index).to(scores.device)
    return rows, ids


def add_biases(scores: Tensor, rows: Sequence[Row]) -> None:
    """In place: `logit_bias` is added."""
    biased = Entries()
    biases = []
    for i, row in enumerate(rows):
        if row.sampling.logit_bias:
            ids, numbers = row.sampling.bias_arrays
            biased.add_array(i, ids)
            biases.append(numbers)
    if biases:
        scores[place(biased.index(), scores)] += torch.from_numpy(np.concatenate(biases)).to(scores)


def penalize_repetition(scores: Tensor, rows: Sequence[Row]) -> None:
    """In place: positive scores of ids in prompt or answer are divided, others multiplied.

    Keskar et al., "CTRL" (2019).
    """
    seen = Entries()
    penalties = []
    for i, row in enumerate(rows):
        if row.sampling.repetition_penalty != 1:
            seen.add(i, row.ids)
            penalties.append(row.sampling.repetition_penalty)
    if penalties:
        where = place(seen.index(), scores)
        penalty = torch.from_numpy(seen.each(penalties)).to(scores)
        old = scores[where]
        # An id that was seen twice gets the same score twice.
        scores[where] = torch.where(old < 0, old * penalty, old / penalty)


def penalize_answered(scores: Tensor, rows: Sequence[Row]) -> None:
    """In place: an id that the answer has had c times loses c * frequency + presence penalty.

    The formula is that of OpenAI's API reference. The prompt does not count.
    """
    answered = Entries()
    frequency = np.zeros(len(rows))
    presence = np.zeros(len(rows))
    for i, row in enumerate(rows):
        frequency[i], presence[i] = row.sampling.frequency_penalty, row.sampling.presence_penalty
        if frequency[i] or presence[i]:
            answered.add(i, row.ids[row.n_prompt :])
    if answered.ids:
        row_numbers, ids = answered.index()
        distinct, counts = np.unique(ids * len(rows) + row_numbers, return_counts=True)
        ids, row_numbers = np.divmod(distinct, len(rows))
        penalties = counts * frequency[row_numbers] + presence[row_numbers]
        index = np.stack([row_numbers, ids])
        scores[place(index, scores)] -= torch.from_numpy(penalties).to(scores)


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
        scores[place(banned.index(), scores)] = -inf


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
    highest = scores.amax(-1, keepdim=True)  # (B, 1)
    ids = torch.empty(highest.shape, dtype=torch.int64, device=scores.device)
    greedy: list[int] = []
    by_top_k: dict[int, list[int]] = {}  # top_k -> rows
    for i, row in enumerate(rows):
        if row.sampling.temperature == 0:
            greedy.append(i)
        else:
            by_top_k.setdefault(row.sampling.top_k, []).append(i)
    if greedy:
        place = row_index(greedy, len(rows))
        ids[place] = best(scores[place])
    for top_k, group in by_top_k.items():
        place = row_index(group, len(rows))
        ids[place] = sample(scores[place], highest[place], top_k, [rows[i] for i in group])
    return ids.masked_fill_(~highest.isfinite(), -1)[:, 0]


def row_index(numbers: list[int], n_rows: int) -> list[int] | slice:
    """An index of these rows, ascending, out of `n_rows`; all of them are a slice, not a copy."""
    if len(numbers) == n_rows:
        return slice(None)
    return numbers


def sample(scores: Tensor, highest: Tensor, top_k: int, rows: Sequence[Row]) -> Tensor:
    """An id (R, 1) drawn from each row's `top_k` best, 0 for all. OVERWRITES `scores` (R, V).

    `highest` (R, 1) is the best score of each row.
    """
    ids = None
    if top_k:
        scores, ids = scores.topk(min(top_k, scores.shape[1]))  # (R, K)
    settings = [row.sampling for row in rows]
    weights = weigh(scores, highest, settings)
    sums = block_sums(weights)
    limit = column([s.top_p if s.top_p < 1 else inf for s in settings], scores)
    limit *= sums.sum(-1, keepdim=True)  # of all probability, before min-p
    if any(s.min_p for s in settings):
        drop_below_min_p(weights, settings)
        sums = block_sums(weights)
    places = draw_place(weights, sums, noise(rows, scores))  # (R, 1)
    if any(s.top_p < 1 for s in settings):
        draw_outsiders_again(places, weights, limit, rows)
    if ids is None:
        return places
    return ids.gather(1, places)


def column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers, one a row, as float64 (R, 1) on the device of `like`."""
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)[:, None]


def noise(rows: Sequence[Row], like: Tensor, attempt: int = 0) -> Tensor:
    """The noise (R, 1) of the next token of each row, float64 on the device of `like`."""
    numbers = [uniform(row.sampling.seed, row.candidate, len(row.ids), attempt) for row in rows]
    return column(numbers, like)


def uniform(seed: int, candidate: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) of 52 bits, by BLAKE2b.

    It is a pure function of the seed, the token's place, and how often that was drawn before.
    """
    key = f"{seed} {candidate} {position}"
    if attempt:
        key += f" {attempt}"
    digest = blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 12) * 2.0**-52


def weigh(scores: Tensor, highest: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """In place: scores (R, K) become probabilities at each row's temperature, times some number.

    The best score of each row, `highest` (R, 1), becomes 1. Where it is infinite or a NaN, the row
    gets NaNs; `choose` gives such a row no id. (A softmax would take longer. `exp2` of the same
    number differs in its last bit between the middle of a tensor and its end, on a CPU.)
    """
    scale = column([1 / max(s.temperature, 1e-30) for s in settings], scores)
    return scores.sub_(highest).mul_(scale.float()).exp_()


def drop_below_min_p(weights: Tensor, settings: Sequence[Sampling]) -> None:
    """In place: 0 for weights (R, K) below `min_p` of their row's largest, which is 1."""
    bound = column([s.min_p for s in settings], weights).float()
    # Numbers, not bools, are kept apart: a third of the time that a mask takes.
    weights.mul_(torch.ge(weights, bound, out=torch.empty_like(weights)))


def draw_outsiders_again(
    places: Tensor, weights: Tensor, limit: Tensor, rows: Sequence[Row]
) -> None:
    """In place: another of `places` (R, 1), drawn from weights (R, K), for each outside of top-p.

    `limit` (R, 1) is the sum of top-p, in ONEths. What is heavier than a place outside still holds
    all of top-p, so the next draw is from there: no row is sorted (FlashInfer, arXiv 2501.01005).
    At a top-p of 0.95 about a twentieth of the draws is repeated; at 0, which leaves the best id
    alone, all of 32 flat rows of 50,257 had it after 19 rounds.
    """
    pending = list(range(len(rows)))
    for attempt in count(1):
        weights, sums, is_outside = heavier(weights, places[pending], limit[pending])
        again = [i for i, outside in enumerate(is_outside[:, 0].tolist()) if outside]
        if not again:
            return
        pending, weights = [pending[i] for i in again], weights[again]
        numbers = noise([rows[i] for i in pending], weights, attempt)
        places[pending] = draw_place(weights, sums[again], numbers)


def heavier(weights: Tensor, places: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights (R, K) that are above that of the place (R, 1) of each row, 0 for the others.

    With them come their block sums, and whether (R, 1) the sum of these reaches `limit` (R, 1):
    then the place is not among the likeliest that have so much together. A row's heaviest always
    are.
    """
    above = torch.gt(weights, weights.gather(1, places), out=torch.empty_like(weights))
    above.mul_(weights)
    sums = block_sums(above)
    total = sums.sum(-1, keepdim=True)
    return above, sums, (total >= limit) & (total > 0)
