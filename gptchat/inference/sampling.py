"""Logits (B, V) -> next ids, each row with its own settings and its own noise.

The settings mean what they mean in transformers' `generate`, in its order: repetition penalty, bad words, suppressed
ids; then, unless greedy, temperature, top-k, top-p, min-p. (Of equal scores at the edge top-k keeps k, top-p all.)

The noise is one uniform number per token, a hash of (seed, candidate, position), made an id by inverting the cumulative
distribution in whole numbers: their sums are exact in any order on any device, and what weighs 0 is never drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from math import inf, log
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptchat.inference.text import WordFilter

WEIGHT_OF_THE_BEST = 2.0**40  # times less than 2**23 ids stays within int64


def _setting(default: float, low: float, high: float, meaning: str) -> Any:
    """A number that a person may choose: the terminal chat and the server take range and help from here."""
    return field(default=default, metadata={"low": low, "high": high, "help": meaning})


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens. Raises ValueError with the reason if a setting is out of its range."""

    temperature: float = _setting(1.0, 0, 100, "0 takes the likeliest token")
    top_k: int = _setting(0, 0, inf, "draw from this many of the likeliest tokens; 0: from all")
    top_p: float = _setting(
        1.0, 0, 1, "draw from the likeliest tokens that have this probability together"
    )
    min_p: float = _setting(
        0.0, 0, 1, "leave out tokens below this share of the likeliest one's probability"
    )
    repetition_penalty: float = _setting(
        1.0, 0.01, 100, "1 is none (Keskar et al. 2019); counts prompt and answer"
    )
    max_new_tokens: int = _setting(64, 0, inf, "of one answer")
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    word_filter: WordFilter | None = None
    seed: int = 0
    logprobs: int | None = (
        None  # how many best ids beside the drawn one; None: no log-probabilities
    )

    def __post_init__(self) -> None:
        for name, declared in SETTINGS.items():
            value, low, high = (
                getattr(self, name),
                declared.metadata["low"],
                declared.metadata["high"],
            )
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, wanted from {low} to {high}")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs is {self.logprobs}, wanted from 0 to {inf}")
        if not all(self.bad_words_ids):
            raise ValueError("bad_words_ids has a word without ids")


SETTINGS = {declared.name: declared for declared in fields(Sampling) if "help" in declared.metadata}


@dataclass
class Row:
    """What is known of a row: its settings, which of its request's candidates it is, and prompt and answer so far."""

    sampling: Sampling
    candidate: int
    ids: list[int]


class Scored(NamedTuple):
    """An id, the model's log-probability of it (before any setting), and the k best ids with theirs, best first."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


def draw(logits: Tensor, rows: Sequence[Row], suppress: Tensor) -> list[Scored]:
    """The next id of each row, not in `suppress` (S,); -1 where nothing is left. Overwrites float32 logits (B, V)."""
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    untouched = logits[asked]
    scores = logits.float()
    process(scores, rows, suppress)
    ids = choose(scores, rows)
    drawn = [Scored(token) for token in ids.tolist()]
    if asked:
        k = max(rows[i].sampling.logprobs or 0 for i in asked)
        for i, scored in zip(asked, score(untouched, ids[asked].clamp_min(0), k), strict=True):
            drawn[i] = Scored(
                drawn[i].token, scored.logprob, scored.top[: rows[i].sampling.logprobs]
            )
    return drawn


def score(logits: Tensor, ids: Tensor, k: int) -> list[Scored]:
    """The log-probability of ids (N,) under logits (N, V), and the k best of each row."""
    logprobs = logits.float().log_softmax(-1)
    best, best_ids = logprobs.topk(min(k, logits.shape[1]))  # (N, k)
    tops = [
        list(zip(*pair, strict=True)) for pair in zip(best_ids.tolist(), best.tolist(), strict=True)
    ]
    return list(map(Scored, ids.tolist(), logprobs.gather(1, ids[:, None])[:, 0].tolist(), tops))


def process(scores: Tensor, rows: Sequence[Row], suppress: Tensor) -> None:
    """In place: repetition penalties; -inf for suppressed ids and those that would complete a bad or filtered word."""
    scores.index_fill_(1, suppress, -inf)
    for i, (row, s) in enumerate((row, row.sampling) for row in rows):
        if s.repetition_penalty != 1:
            seen = torch.tensor(row.ids, device=scores.device)
            old = scores[i, seen]
            scores[i, seen] = torch.where(
                old < 0, old * s.repetition_penalty, old / s.repetition_penalty
            )
        banned = [
            w[-1]
            for w in s.bad_words_ids
            if len(w) == 1 or tuple(row.ids[1 - len(w) :]) == tuple(w[:-1])
        ]
        banned += s.word_filter.banned(row.ids) if s.word_filter else []
        if banned:
            scores[i, banned] = -inf


def choose(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """An id (B,) of each row: the best where the temperature is 0, else by the row's noise. `scores` is overwritten."""
    none_left = ~scores.amax(-1, keepdim=True).isfinite()  # (B, 1)
    ids = torch.empty(none_left.shape, dtype=torch.int64, device=scores.device)
    alike: dict[int, list[int]] = {}  # top_k, or -1 for greedy -> rows
    for i, row in enumerate(rows):
        alike.setdefault(row.sampling.top_k if row.sampling.temperature else -1, []).append(i)
    for top_k, places in alike.items():
        some = scores if len(places) == len(rows) else scores[places]  # (R, V)
        ids[places] = (
            some.argmax(-1, True) if top_k < 0 else sample(some, top_k, [rows[i] for i in places])
        )
    return ids.masked_fill_(none_left, -1)[:, 0]


def sample(scores: Tensor, top_k: int, rows: Sequence[Row]) -> Tensor:
    """An id (R, 1) drawn from each row's `top_k` best, 0 for all. `scores` (R, V) is overwritten."""
    if top_k:
        scores, ids = scores.topk(min(top_k, scores.shape[1]))
    cumulative = weigh(scores, [row.sampling for row in rows]).cumsum(-1)  # (R, K)
    noise = column(
        [uniform(row.sampling.seed, row.candidate, len(row.ids)) for row in rows],
        scores,
        torch.float64,
    )
    aim = (noise * cumulative[:, -1:]).long()  # less than the sum, rounded too
    place = torch.searchsorted(cumulative, aim, right=True).clamp_max_(
        scores.shape[1] - 1
    )  # clamped where all is NaN
    return ids.gather(1, place) if top_k else place


def uniform(seed: int, candidate: int, position: int) -> float:
    """A number in [0, 1) of 52 bits, by BLAKE2b: a pure function of the seed and of the token's place."""
    return (
        int.from_bytes(blake2b(f"{seed} {candidate} {position}".encode(), digest_size=8).digest())
        >> 12
    ) * 2.0**-52


def weigh(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Whole numbers (R, K) in proportion to the probabilities, 0 outside top-p and min-p. `scores` is overwritten."""
    scores.sub_(scores.amax(-1, keepdim=True)).div_(
        column([max(s.temperature, 1e-30) for s in settings], scores)
    )
    mass = weights(scores)
    bound = column([log(s.min_p) if s.min_p else -inf for s in settings], scores)
    if narrow := [i for i, s in enumerate(settings) if s.top_p < 1]:
        top_p = column([settings[i].top_p for i in narrow], scores, torch.float64)
        bound[narrow] = nucleus(scores[narrow], top_p).maximum(bound[narrow])
    return mass.mul_(scores >= bound) if narrow or any(s.min_p for s in settings) else mass


def weights(scores: Tensor) -> Tensor:
    return scores.exp().mul_(WEIGHT_OF_THE_BEST).long()


def nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """The least score (R, 1) of the smallest set of best ids that holds `top_p` (R, 1) of the probability."""
    # numpy takes 0.1 ms for a row of 50,257, torch on a CPU 3.5 ms
    ordered = torch.from_numpy(np.sort(scores.numpy())) if scores.is_cpu else scores.sort().values
    cumulative = weights(ordered).cumsum(-1)  # the least probable first
    place = torch.searchsorted(cumulative, ((1 - top_p) * cumulative[:, -1:]).long(), right=True)
    return ordered.gather(1, place.clamp_max_(scores.shape[1] - 1))


def column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number a row (R, 1), on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
