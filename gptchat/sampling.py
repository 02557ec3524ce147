"""Logits (B, V) -> next ids, each row with its own settings and its own noise.

The settings mean what they mean in transformers' `generate`, in its order: repetition penalty, bad words, suppressed
ids; then, unless the temperature is 0 (greedy), temperature, top-k, top-p, min-p. The last three each keep what scores
at least some bound. (So equal scores stay or go together; transformers' top-p lets its sort decide.)

The noise is one uniform number per token, a hash of (seed, candidate, position), made an id by inverting the cumulative
distribution. That is kept in whole numbers: their sums are exact in any order on any device, and an id of no weight is
never drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf, isfinite, log
from typing import NamedTuple

import torch
from torch import Tensor

from gptchat.tokenizer import WordFilter

WEIGHT_OF_THE_BEST = 2.0**40  # times less than 2**23 ids stays within int64
NUCLEUS = (64, 2048)  # so many best ids are sorted to find a top-p set; all of them only where it is wider still


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
        wanted = {
            "temperature": (isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "more than 0"),
            "bad_words_ids": (all(self.bad_words_ids), "words of at least one id"),
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "logprobs": ((self.logprobs or 0) >= 0, "0 or more"),
        }
        for name, (right, range_) in wanted.items():
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted {range_}")


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
    penalize(scores, rows)
    forbid(scores, rows, suppress)
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


def penalize(scores: Tensor, rows: Sequence[Row]) -> None:
    """Divide (multiply, if negative) the scores of ids already in a row by its repetition penalty, in place."""
    for i, row in enumerate(rows):
        if (penalty := row.sampling.repetition_penalty) != 1:
            seen = torch.tensor(row.ids, device=scores.device)
            old = scores[i, seen]
            scores[i, seen] = torch.where(old < 0, old * penalty, old / penalty)


def forbid(scores: Tensor, rows: Sequence[Row], suppress: Sequence[int]) -> None:
    """Set suppressed ids, and those that would complete a bad or a filtered word, to -inf, in place."""
    scores[:, list(suppress)] = -inf
    for i, row in enumerate(rows):
        words, filtered = row.sampling.bad_words_ids, row.sampling.word_filter
        banned = [w[-1] for w in words if len(w) == 1 or tuple(row.ids[1 - len(w) :]) == tuple(w[:-1])]
        banned += filtered.banned(row.ids) if filtered else []
        if banned:
            scores[i, banned] = -inf


def choose(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """An id (B,) of each row: the best where the temperature is 0, else by the row's noise. `scores` is overwritten."""
    best, ids = scores.max(-1)  # (B,)
    hot = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if hot:
        some = scores if len(hot) == len(rows) else scores[hot]
        ids[hot] = sample(some.sub_(best[hot, None]), [rows[i] for i in hot])
    return ids.masked_fill_(~best.isfinite(), -1)


def sample(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Ids (R,) drawn from scores (R, V), of which the best in each row is 0. `scores` is overwritten."""
    cumulative = weigh(scores, [row.sampling for row in rows]).cumsum(-1)  # (R, V)
    noise = column([uniform(row.sampling.seed, row.candidate, len(row.ids)) for row in rows], scores, torch.float64)
    total = cumulative[:, -1:]
    aim = (noise * total).long().minimum(total - 1)
    return torch.searchsorted(cumulative, aim, right=True)[:, 0]


def uniform(seed: int, candidate: int, position: int) -> float:
    """A number in [0, 1) of 52 bits, by BLAKE2b: a pure function of the seed and of the token's place."""
    digest = blake2b(f"{seed} {candidate} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def weigh(scores: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Whole numbers (R, V) in proportion to the probabilities that the settings leave. `scores` is overwritten."""
    scores.div_(column([max(s.temperature, 1e-30) for s in settings], scores))
    mass = weights(scores)
    if any(s.top_k for s in settings):
        mass.mul_(scores >= top_k_bound(scores, [s.top_k for s in settings]))
    if narrow := [i for i, s in enumerate(settings) if s.top_p < 1]:
        bound = column([-inf] * len(settings), scores)
        bound[narrow] = top_p_bound(scores[narrow], mass[narrow], column([settings[i].top_p for i in narrow], scores))
        mass.mul_(scores >= bound)
    if any(s.min_p for s in settings):
        mass.mul_(scores >= column([log(s.min_p) if s.min_p else -inf for s in settings], scores))
    return mass


def weights(scores: Tensor) -> Tensor:
    return scores.exp().mul_(WEIGHT_OF_THE_BEST).long()


def top_k_bound(scores: Tensor, top_k: list[int]) -> Tensor:
    """The score (R, 1) of each row's k-th best id; -inf where k is 0."""
    most = min(max(top_k), scores.shape[1])
    rank = column([min(k or most, most) - 1 for k in top_k], scores, torch.int64)
    return scores.topk(most).values.gather(1, rank).where(column(top_k, scores) > 0, -inf)


def top_p_bound(scores: Tensor, mass: Tensor, top_p: Tensor) -> Tensor:
    """The least score (R, 1) of the smallest set of best ids that holds `top_p` (R, 1) of the mass (R, V)."""
    enough = top_p.double() * mass.sum(-1, keepdim=True)
    for size in (*NUCLEUS, scores.shape[1]):
        best = scores.topk(min(size, scores.shape[1])).values
        share = weights(best)
        needed = share.cumsum(-1) - share < enough  # while what stands before an id does not suffice
        if not needed[:, -1].any():
            break
    return best.gather(1, needed.sum(-1, keepdim=True).sub_(1).clamp_min_(0))


def column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number a row (R, 1), on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
