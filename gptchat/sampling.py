"""Logits (B, V) -> next ids, each row with its own settings and its own noise.

The settings mean what they mean in transformers' `generate`, in its order: repetition penalty, bad words, suppressed
ids; then, unless greedy, temperature, top-k, top-p, min-p. Equal scores stay or go together; transformers' top-p lets
its sort decide.

The noise is one uniform number per token, a hash of (seed, candidate, position), made an id by inverting the cumulative
distribution in whole numbers: their sums are exact in any order on any device, and what weighs 0 is never drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf, log
from typing import NamedTuple

import torch
from torch import Tensor

from gptchat.tokenizer import WordFilter

WEIGHT_OF_THE_BEST = 2.0**40  # times less than 2**23 ids stays within int64
NUCLEUS = (64, 2048)  # so many best ids are sorted to find a top-p set; all of them only where it is wider still
RANGES = {"temperature": (0, 100), "top_k": (0, inf), "top_p": (0, 1), "min_p": (0, 1), "max_new_tokens": (0, inf),
          "repetition_penalty": (0.01, 100), "logprobs": (0, inf)}


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens. Raises ValueError with the reason if a setting is out of its range."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # Keskar et al. 2019 (CTRL), over prompt and answer
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    word_filter: WordFilter | None = None
    seed: int = 0
    max_new_tokens: int = 64
    logprobs: int | None = None  # that many best ids beside the drawn one; None: no log-probabilities at all

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not (least <= value <= most if value is not None else name == "logprobs"):
                raise ValueError(f"{name} is {value}, wanted from {least} to {most}")
        if not all(self.bad_words_ids):
            raise ValueError("bad_words_ids has a word without ids")


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


def draw(logits: Tensor, rows: Sequence[Row], suppress: Sequence[int] = ()) -> list[Scored]:
    """The next id of each row, -1 where nothing may be drawn. Float32 `logits` (B, V) are overwritten."""
    asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
    untouched = logits[asked]
    scores = logits.float()
    process(scores, rows, suppress)
    ids = choose(scores, rows)
    drawn = [Scored(token) for token in ids.tolist()]
    if asked:
        k = max(rows[i].sampling.logprobs or 0 for i in asked)
        for i, scored in zip(asked, score(untouched, ids[asked].clamp_min(0), k), strict=True):
            drawn[i] = Scored(drawn[i].token, scored.logprob, scored.top[: rows[i].sampling.logprobs])
    return drawn


def score(logits: Tensor, ids: Tensor, k: int) -> list[Scored]:
    """The log-probability of ids (N,) under logits (N, V), and the k best of each row."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)  # (N, 1)
    of_ids = (logits.gather(1, ids[:, None]) - total)[:, 0].tolist()
    best, best_ids = logits.topk(min(k, logits.shape[1]))  # (N, k)
    tops = [list(zip(*pair, strict=True)) for pair in zip(best_ids.tolist(), (best - total).tolist(), strict=True)]
    return list(map(Scored, ids.tolist(), of_ids, tops))


def process(scores: Tensor, rows: Sequence[Row], suppress: Sequence[int]) -> None:
    """In place: divide (multiply, if negative) the scores of ids already in a row by its repetition penalty; set the
    suppressed ids, and those that would complete a bad or a filtered word, to -inf."""
    scores[:, list(suppress)] = -inf
    for i, (row, s) in enumerate((row, row.sampling) for row in rows):
        if s.repetition_penalty != 1:
            seen = torch.tensor(row.ids, device=scores.device)
            old = scores[i, seen]
            scores[i, seen] = torch.where(old < 0, old * s.repetition_penalty, old / s.repetition_penalty)
        banned = [w[-1] for w in s.bad_words_ids if len(w) == 1 or tuple(row.ids[1 - len(w) :]) == tuple(w[:-1])]
        banned += s.word_filter.banned(row.ids) if s.word_filter else []
        if banned:
            scores[i, banned] = -inf


def choose(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """An id (B,) of each row: the best where the temperature is 0, else by the row's noise. `scores` is overwritten."""
    best, ids = scores.max(-1, keepdim=True)  # (B, 1)
    hot = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if hot:
        some = (scores if len(hot) == len(rows) else scores[hot]).sub_(best[hot])  # (R, V)
        cumulative = weigh(some, [rows[i].sampling for i in hot]).cumsum(-1)
        noise = [uniform(rows[i].sampling.seed, rows[i].candidate, len(rows[i].ids)) for i in hot]
        aim = (column(noise, scores, torch.float64) * cumulative[:, -1:]).long()  # less than the total, rounded too
        ids[hot] = torch.searchsorted(cumulative, aim, right=True)
    return ids.masked_fill_(~best.isfinite(), -1)[:, 0]


def uniform(seed: int, candidate: int, position: int) -> float:
    """A number in [0, 1) of 52 bits, by BLAKE2b: a pure function of the seed and of the token's place."""
    digest = blake2b(f"{seed} {candidate} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def weigh(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Whole numbers (R, V) in proportion to what is left of the probabilities; the best score of a row is 0."""
    scores.div_(column([max(s.temperature, 1e-30) for s in settings], scores))
    mass = scores.exp().mul_(WEIGHT_OF_THE_BEST).long()
    if most := min(max(s.top_k for s in settings), scores.shape[1]):
        rank = column([min(s.top_k or most, most) - 1 for s in settings], scores, torch.int64)
        bound = scores.topk(most).values.gather(1, rank)
        mass.mul_((scores >= bound) | column([not s.top_k for s in settings], scores, torch.bool))
    if narrow := [i for i, s in enumerate(settings) if s.top_p < 1]:
        bound = column([-inf] * len(settings), scores)
        bound[narrow] = nucleus(scores[narrow], mass[narrow], column([settings[i].top_p for i in narrow], scores))
        mass.mul_(scores >= bound)
    if any(s.min_p for s in settings):
        mass.mul_(scores >= column([log(s.min_p) if s.min_p else -inf for s in settings], scores))
    return mass


def nucleus(scores: Tensor, mass: Tensor, top_p: Tensor) -> Tensor:
    """The least score (R, 1) of the smallest set of best ids that holds `top_p` (R, 1) of the mass (R, V)."""
    enough = top_p.double() * mass.sum(-1, keepdim=True)
    for size in (*NUCLEUS, scores.shape[1]):
        best = scores.topk(min(size, scores.shape[1]))
        share = mass.gather(1, best.indices)
        needed = share.cumsum(-1) - share < enough  # while what stands before an id does not suffice
        if not needed[:, -1].any():
            break
    return best.values.gather(1, needed.sum(-1, keepdim=True).sub_(1).clamp_min_(0))


def column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number a row (R, 1), on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
