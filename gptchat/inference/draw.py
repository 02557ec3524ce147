"""Logits (B, V) -> next ids, each row with its own settings (`sampling.py`) and its own noise.

`distribution` says plainly what is drawn from; `Draw` does it fast for many rows. First scores
change and ids are banned (logit bias, penalties, filtered words, stop ids before `min_tokens`).
Then come temperature and top-k, then the cut by top-p and min-p.

Invariant of the cut: every id that is heavier than a drawn one is still there. So top-p needs no
sorted row: an id is outside if the heavier ones together have all of top-p.

A row's id does not depend on the other rows. Its noise, a hash of (seed, candidate, position) in
[0, 1), becomes an id by the inverse of the cumulative distribution. If ids tie at the cut, top-k
keeps k of them, top-p all.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptchat.inference.blocks import ONE, best, block_sums, draw_place, invert
from gptchat.inference.sampling import Sampling
from gptchat.inference.text import BROKEN, CharacterFilter


@dataclass
class Row:
    """A sequence: its settings and its ids so far; the answer begins after `n_prompt` of them."""

    sampling: Sampling
    candidate: int  # its number among those of its request
    ids: Sequence[int]
    n_prompt: int = 0
    stop_ids: Sequence[int] = ()

    def banned(self) -> list[int]:
        """What must not come next: filtered words, and stop ids before `min_tokens`."""
        banned = []
        if self.sampling.word_filter:
            banned += self.sampling.word_filter.banned(self.ids)
        if len(self.ids) - self.n_prompt < self.sampling.min_tokens:
            banned += self.stop_ids
        return banned


class Scored(NamedTuple):
    """An id with the model's log-probability (before any setting), and those of the best ids.

    `logprob` is None for a prompt's first token, and if it was not requested.
    """

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


def distribution(logits: Tensor, row: Row, suppress: Sequence[int] = ()) -> Tensor:
    """The probabilities (V,) of the next id, by every setting but `whole_characters`.

    `Draw` is tested against this.
    """
    settings = row.sampling
    scores = logits.to(torch.float64, copy=True)
    for id, bias in settings.logit_bias.items():
        scores[id] += bias
    for id in set(row.ids):
        penalty = settings.repetition_penalty
        scores[id] *= penalty if scores[id] < 0 else 1 / penalty
    for id, times in Counter(row.ids[row.n_prompt :]).items():
        scores[id] -= times * settings.frequency_penalty + settings.presence_penalty
    scores[[*suppress, *row.banned()]] = -inf
    if settings.temperature == 0:
        return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
    scores = (scores - scores.max()) / settings.temperature
    if settings.top_k:
        scores[scores < scores.topk(min(settings.top_k, len(scores))).values[-1]] = -inf
    probabilities = scores.softmax(0)
    descending = probabilities.sort(descending=True)
    heavier = descending.values.cumsum(0) - descending.values  # the sum of what comes before
    if settings.top_p < 1:
        probabilities[descending.indices[1:][heavier[1:] >= settings.top_p]] = 0
    probabilities[probabilities < settings.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def score(logits: Tensor, ids: Tensor, k: int) -> list[Scored]:
    """The log-probabilities of ids (N,) under logits (N, V), and the k best of each row."""
    logprobs = logits.float().log_softmax(-1)  # (N, V)
    top_logprobs, top_ids = logprobs.topk(min(k, logits.shape[1]))  # (N, k)
    of_ids = logprobs.gather(1, ids[:, None])  # (N, 1)
    # One table, so that a GPU is waited for once
    columns = (ids[:, None], of_ids, top_ids, top_logprobs)
    table = torch.cat([column.double() for column in columns], dim=1).tolist()
    scored = []
    for token, logprob, *top in table:
        n = len(top) // 2
        best_ids = map(int, top[:n])
        scored.append(Scored(int(token), logprob, list(zip(best_ids, top[n:], strict=True))))
    return scored


class Draw:
    """Draws the next ids of the same rows, step after step, while their `ids` grow.

    `suppress` (S,) are never drawn. `whole_characters` needs `characters`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        suppress: Tensor,
        characters: CharacterFilter | None = None,
    ):
        self.rows = rows
        self.suppress = suppress
        self.characters = characters
        self.device = suppress.device
        settings = [row.sampling for row in rows]
        self.scored = [i for i, s in enumerate(settings) if s.logprobs is not None]
        self.filtered = [i for i, s in enumerate(settings) if s.word_filter or s.min_tokens]
        self.counted = [
            i for i, s in enumerate(settings) if s.frequency_penalty or s.presence_penalty
        ]
        self.penalizes = bool(self.counted) or any(s.repetition_penalty != 1 for s in settings)
        penalties = [s.repetition_penalty for s in settings]
        self.repetition_penalty = column(penalties, self.device).float()
        self.biases: list[tuple[int, Tensor, Tensor]] = []  # row, ids, what is added
        by_top_k: dict[int | None, list[int]] = {}  # None: greedy rows
        for i, s in enumerate(settings):
            if s.logit_bias:
                ids = torch.tensor([*s.logit_bias], device=self.device)
                biases = torch.tensor([*s.logit_bias.values()], device=self.device)
                self.biases.append((i, ids, biases.float()))
            by_top_k.setdefault(s.top_k if s.temperature else None, []).append(i)
        self.groups = [Group(rows, numbers, self.device) for numbers in by_top_k.values()]

    def __call__(self, logits: Tensor) -> tuple[list[Scored], Tensor]:
        """What is drawn for each row, and the ids (B, 1); -1 if nothing is left to draw.

        OVERWRITES float32 logits (B, V).
        """
        untouched = logits[self.scored] if self.scored else logits  # a copy if needed
        scores = logits.float()  # a copy only if they are not float32
        self.change(scores)
        if len(self.groups) == 1:
            ids = self.groups[0].draw(scores)
        else:
            ids = torch.empty(len(self.rows), 1, dtype=torch.int64, device=self.device)
            for group in self.groups:
                ids[group.numbers] = group.draw(scores[group.numbers])
        drawn = [Scored(token) for [token] in ids.tolist()]
        if self.scored:
            n_top = [self.rows[i].sampling.logprobs or 0 for i in self.scored]
            all_scored = score(untouched, ids[self.scored, 0].clamp_min(0), max(n_top))
            for i, k, scored in zip(self.scored, n_top, all_scored, strict=True):
                drawn[i] = Scored(drawn[i].token, scored.logprob, scored.top[:k])
        return drawn, ids

    def change(self, scores: Tensor) -> None:
        """In place: biases, penalties and bans (-inf) on scores (B, V)."""
        for i, ids, biases in self.biases:
            scores[i, ids] += biases
        if self.penalizes:
            self.penalize(scores)
        scores.index_fill_(1, self.suppress, -inf)
        for i in self.filtered:
            scores[i, self.rows[i].banned()] = -inf
        if self.characters:
            self.keep_characters_whole(scores, self.characters)

    def penalize(self, scores: Tensor) -> None:
        """In place: penalties on scores (B, V) of ids that a row already has.

        Repetition penalty: Keskar et al., "CTRL", 2019. An id that the answer has c times loses
        c * frequency + presence penalty (OpenAI's API reference).
        """
        width = max(len(row.ids) for row in self.rows)
        ids = np.empty((len(self.rows), width), np.int64)
        for i, row in enumerate(self.rows):
            ids[i, : len(row.ids)] = row.ids
            ids[i, len(row.ids) :] = row.ids[0]  # duplicates get the same score
        index = torch.from_numpy(ids).to(self.device)  # (B, T)
        old = scores.gather(1, index)
        new = torch.where(old < 0, old * self.repetition_penalty, old / self.repetition_penalty)
        if self.counted:
            taken = np.zeros(ids.shape)
            for i in self.counted:
                row = self.rows[i]
                answer = np.array(row.ids[row.n_prompt :], np.int64)
                times = np.bincount(answer, minlength=scores.shape[1])[ids[i]]
                taken[i] = times * row.sampling.frequency_penalty
                taken[i] += (times > 0) * row.sampling.presence_penalty
            new -= torch.from_numpy(taken).to(new)
        scores.scatter_(1, index, new)

    def keep_characters_whole(self, scores: Tensor, characters: CharacterFilter) -> None:
        """In place: -inf for ids that would break a character, in rows with `whole_characters`."""
        states = [
            characters.state(row.ids) if row.sampling.whole_characters else BROKEN
            for row in self.rows
        ]
        if not any(states):  # the usual case, in a tenth of the mask's time
            scores.index_fill_(1, characters.forbidden_between, -inf)
        else:
            scores.masked_fill_(characters.forbidden[states], -inf)


def column(numbers: Sequence[float], device: torch.device) -> Tensor:
    """One number per row, as float64 (R, 1)."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]


def noise(rows: Sequence[Row], device: torch.device, attempt: int = 0) -> Tensor:
    """The noise (R, 1) of the next token of each row, float64."""
    numbers = [uniform(row.sampling.seed, row.candidate, len(row.ids), attempt) for row in rows]
    return column(numbers, device)


def uniform(seed: int, candidate: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1) of 52 bits, by BLAKE2b. `attempt` counts redraws of the same token."""
    key = f"{seed} {candidate} {position}"
    if attempt:
        key += f" {attempt}"
    digest = blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 12) * 2.0**-52


class Group:
    """Rows that are drawn together: all are greedy, or all have the same top-k."""

    def __init__(self, rows: Sequence[Row], numbers: list[int], device: torch.device):
        self.numbers = numbers
        self.rows = [rows[i] for i in numbers]
        settings = [row.sampling for row in self.rows]
        self.is_greedy = settings[0].temperature == 0
        self.top_k = settings[0].top_k
        self.scale = column([1 / max(s.temperature, 1e-30) for s in settings], device).float()
        self.cuts = any(s.top_p < 1 for s in settings)
        self.top_p = column([s.top_p if s.top_p < 1 else inf for s in settings], device)
        self.has_min_p = any(s.min_p for s in settings)
        self.min_p = column([s.min_p for s in settings], device).float()

    def draw(self, scores: Tensor) -> Tensor:
        """An id (R, 1) for each row; -1 if no score is finite. OVERWRITES `scores` (R, V)."""
        if self.is_greedy:
            places = best(scores)
            highest = scores.gather(1, places)
        elif self.top_k:
            scores, ids = scores.topk(min(self.top_k, scores.shape[1]))  # (R, K)
            highest = scores[:, :1].clone()
            places = ids.gather(1, self.draw_sorted(weigh(scores, highest, self.scale)))
        else:
            highest = scores.amax(-1, keepdim=True)
            places = self.draw_unsorted(weigh(scores, highest, self.scale))
        return places.masked_fill_(~(highest.abs() < inf), -1)  # NaN is not below

    def draw_sorted(self, weights: Tensor) -> Tensor:
        """A place (R, 1) in each row of descending weights (R, K)."""
        shares = (weights * ONE).long()  # integers add up exactly, in any order
        bound = self.min_p
        if self.cuts:
            cumulative = shares.cumsum(-1)
            inside = cumulative - shares < self.top_p * cumulative[:, -1:]
            last = inside.sum(-1, keepdim=True) - 1
            bound = torch.maximum(weights.gather(1, last.clamp_min_(0)), bound)
        cumulative = shares.masked_fill_(weights < bound, 0).cumsum(-1)
        return invert(cumulative, noise(self.rows, weights.device) * cumulative[:, -1:])

    def draw_unsorted(self, weights: Tensor) -> Tensor:
        """A place (R, 1) in each row of weights (R, K)."""
        sums = block_sums(weights)
        limit = self.top_p * sums.sum(-1, keepdim=True)  # of all weights, before min-p
        if self.has_min_p:
            # Multiplying by 0.0 and 1.0 takes a third of a mask's time.
            weights.mul_(torch.ge(weights, self.min_p, out=torch.empty_like(weights)))
            sums = block_sums(weights)
        places = draw_place(weights, sums, noise(self.rows, weights.device))
        if self.cuts:
            draw_outsiders_again(places, weights, limit, self.rows)
        return places


def weigh(scores: Tensor, highest: Tensor, scale: Tensor) -> Tensor:
    """In place: scores (R, K) become weights, exp(scale * (score - highest)), at most 1.

    A row whose best score `highest` (R, 1) is infinite or NaN gets NaNs. (A softmax takes longer;
    `exp2` gives equal numbers different last bits.)
    """
    return scores.sub_(highest).mul_(scale).exp_()


def draw_outsiders_again(
    places: Tensor, weights: Tensor, limit: Tensor, rows: Sequence[Row]
) -> None:
    """In place: redraws each of `places` (R, 1) that is outside top-p of weights (R, K).

    `limit` (R, 1) is the weight of top-p in the unit of `block_sums`. If a draw missed top-p, all
    of top-p is heavier, so the redraw is among the heavier ids (FlashInfer, arXiv 2501.01005).
    """
    pending = list(range(len(rows)))
    for attempt in count(1):
        weights, sums, is_outside = heavier(weights, places[pending], limit[pending])
        again = [i for i, outside in enumerate(is_outside[:, 0].tolist()) if outside]
        if not again:
            return
        pending, weights = [pending[i] for i in again], weights[again]
        numbers = noise([rows[i] for i in pending], weights.device, attempt)
        places[pending] = draw_place(weights, sums[again], numbers)


def heavier(weights: Tensor, places: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights (R, K) above that of each row's place (R, 1), else 0; their block sums.

    And whether (R, 1) their total reaches `limit` (R, 1): then the place is outside top-p.
    """
    above = torch.gt(weights, weights.gather(1, places), out=torch.empty_like(weights))
    above.mul_(weights)
    sums = block_sums(above)
    total = sums.sum(-1, keepdim=True)
    return above, sums, (total >= limit) & (total > 0)
