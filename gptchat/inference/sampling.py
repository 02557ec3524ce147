"""Logits (B, V) -> next ids, each row with its own settings and its own noise.

The settings mean what they mean in transformers' `generate` and in OpenAI's API, in this order:
logit bias; repetition penalty, frequency and presence penalty; filtered words, suppressed ids, stop
ids before `min_tokens`; then, unless greedy, temperature, top-k, top-p, min-p. (Where scores tie at
the cut, top-k keeps k ids and top-p all that tie.) `whole_characters`, which neither has, is on
unless it is 0: an answer is then the same wherever theirs has no U+FFFD.

Given its logits, a row's id does not depend on the other rows. Its noise is one number in [0, 1), a
hash of (seed, candidate, position), which becomes an id by inverting the cumulative distribution.
Probabilities become integer weights (WEIGHT_OF_THE_BEST for the likeliest id), so their sums are
exact in any order on any device, and an id of weight 0 is never drawn.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from math import inf, log
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptchat.inference.text import BROKEN, CharacterFilter, WordFilter

WEIGHT_OF_THE_BEST = 2.0**40  # 2**23 ids of that weight still fit into an int64
LARGEST_BIAS = 100  # as in OpenAI's API; more than that lies between no two logits that matter


def _number(default: float, *, low: float, high: float, help: str) -> Any:
    """A number that a user may choose, from `low` to `high`, both included."""
    return field(default=default, metadata={"low": low, "high": high, "help": help})


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens. Raises ValueError for a setting of another type or range.

    A number is an int where it is declared so, else an int or a float; True is neither, and numpy's
    integers are not ints.

    The terminal chat and the server take a number's range and help from its declaration here.
    `word_filter` forbids what may come next. `logit_bias` maps an id to what is added to its logit,
    -100 to 100; an id that is suppressed stays so. The same `seed` gives the same answer, up to the
    rounding that `engine` tells of. `logprobs` is how many of the best ids are listed with each
    token's log-probability; None: not even that.
    """

    temperature: float = _number(1.0, low=0, high=100, help="0 takes the likeliest token")
    top_k: int = _number(
        0, low=0, high=inf, help="draw from this many of the likeliest tokens; 0: from all"
    )
    top_p: float = _number(
        1.0,
        low=0,
        high=1,
        help="draw from the likeliest tokens that have this probability together",
    )
    min_p: float = _number(
        0.0,
        low=0,
        high=1,
        help="leave out tokens below this share of the likeliest one's probability",
    )
    repetition_penalty: float = _number(
        1.0, low=0.01, high=100, help="1 is none (Keskar et al. 2019); counts prompt and answer"
    )
    frequency_penalty: float = _number(
        0.0, low=-2, high=2, help="taken from a token's logit each time the answer has had it"
    )
    presence_penalty: float = _number(
        0.0, low=-2, high=2, help="taken once from the logit of each token that the answer has had"
    )
    min_tokens: int = _number(
        0, low=0, high=inf, help="the model does not end an answer before; a stop string does"
    )
    max_new_tokens: int = _number(64, low=0, high=inf, help="of one answer")
    whole_characters: int = _number(
        1, low=0, high=1, help="1: no id that would break a character is drawn; 0: any may be"
    )
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    word_filter: WordFilter | None = None
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, declared in SETTINGS.items():
            low, high = declared.metadata["low"], declared.metadata["high"]
            _check_number(name, getattr(self, name), type(declared.default), low, high)
        for id, bias in self.logit_bias.items():
            _check_number("an id of logit_bias", id, int, 0, inf)
            _check_number(f"logit_bias of {id}", bias, float, -LARGEST_BIAS, LARGEST_BIAS)
        _check_number("seed", self.seed, int, -inf, inf)
        if self.logprobs is not None:
            _check_number("logprobs", self.logprobs, int, 0, inf)


# The numbers among the settings: name -> field, whose metadata are "low", "high" and "help"
SETTINGS = {declared.name: declared for declared in fields(Sampling) if "help" in declared.metadata}


def _check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    is_number = type(value) is int or (kind is float and isinstance(value, float))
    if not is_number:  # True is an int for isinstance
        wanted = "an int" if kind is int else "a number"
        raise ValueError(f"{name} is {value!r}, wanted {wanted} from {low} to {high}")
    if not low <= value <= high:  # NaN is nowhere
        raise ValueError(f"{name} is {value}, wanted from {low} to {high}")


def parse_biases(texts: Sequence[str], vocab_size: int) -> dict[int, float]:
    """A `logit_bias` from texts ID=BIAS; an empty text is none. Raises ValueError for another."""
    biases = {}
    for text in filter(None, texts):
        id, _, bias = text.partition("=")
        if not id.isdecimal() or int(id) >= vocab_size:
            raise ValueError(f"logit_bias {text}: wanted ID=BIAS with an id below {vocab_size}")
        try:
            biases[int(id)] = float(bias)
        except ValueError:
            raise ValueError(f"logit_bias {text}: wanted ID=BIAS, such as 17=-2.5") from None
    return biases


@dataclass
class Row:
    """A sequence to draw for: its settings, the number of its candidate, and prompt and answer.

    The answer begins after `n_prompt` ids. A stop id would end it.
    """

    sampling: Sampling
    candidate: int  # which of its request's
    ids: list[int]
    n_prompt: int = field(default=0, kw_only=True)
    stop_ids: Sequence[int] = field(default=(), kw_only=True)


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
    of_ids = logprobs.gather(1, ids[:, None])[:, 0]  # (N,)
    tokens = zip(ids.tolist(), of_ids.tolist(), strict=True)
    tops = zip(top_ids.tolist(), top_logprobs.tolist(), strict=True)
    scored = []
    for (token, logprob), (best_ids, best_logprobs) in zip(tokens, tops, strict=True):
        top = list(zip(best_ids, best_logprobs, strict=True))
        scored.append(Scored(token, logprob, top))
    return scored


def penalize_and_ban(scores: Tensor, rows: Sequence[Row], suppress: Tensor) -> None:
    """In place: what the settings of each row change in its scores (B, V) before it is drawn.

    -inf stands for what may not be drawn: suppressed ids, those that a filter forbids, and stop ids
    before `min_tokens`.
    """
    scores.index_fill_(1, suppress, -inf)
    for i, row in enumerate(rows):
        if row.sampling.logit_bias:
            ids, biases = row.sampling.logit_bias.keys(), row.sampling.logit_bias.values()
            scores[i, list(ids)] += scores.new_tensor(list(biases))
        if row.sampling.repetition_penalty != 1:
            penalize_repetition(scores[i], row)
        if row.sampling.frequency_penalty or row.sampling.presence_penalty:
            penalize_answered(scores[i], row)
        if row.sampling.word_filter:
            banned = row.sampling.word_filter.banned(row.ids)
            if banned:
                scores[i, banned] = -inf
        if row.sampling.min_tokens and len(row.ids) - row.n_prompt < row.sampling.min_tokens:
            scores[i, list(row.stop_ids)] = -inf


def penalize_repetition(scores: Tensor, row: Row) -> None:
    """In place: positive scores (V,) of ids in prompt or answer are divided, others multiplied.

    Keskar et al., "CTRL" (2019).
    """
    penalty = row.sampling.repetition_penalty
    seen = torch.tensor(row.ids, device=scores.device)
    old = scores[seen]
    scores[seen] = torch.where(old < 0, old * penalty, old / penalty)


def penalize_answered(scores: Tensor, row: Row) -> None:
    """In place: an id that the answer has had c times loses c * frequency + presence penalty.

    The formula is that of OpenAI's API reference. The prompt does not count.
    """
    counts = Counter(row.ids[row.n_prompt :])
    if counts:
        ids = torch.tensor(list(counts), device=scores.device)
        times = scores.new_tensor(list(counts.values()))
        penalty = times * row.sampling.frequency_penalty + row.sampling.presence_penalty
        scores[ids] -= penalty


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
        ids[greedy] = select_rows(scores, greedy).argmax(-1, True)
    for top_k, group in by_top_k.items():
        ids[group] = sample(select_rows(scores, group), top_k, [rows[i] for i in group])
    return ids.masked_fill_(none_left, -1)[:, 0]


def select_rows(scores: Tensor, indices: list[int]) -> Tensor:
    """The rows (R, V) at ascending indices: a copy, unless they are all rows."""
    if len(indices) == len(scores):
        return scores
    return scores[indices]


def sample(scores: Tensor, top_k: int, rows: Sequence[Row]) -> Tensor:
    """An id (R, 1) drawn from each row's `top_k` best, 0 for all. OVERWRITES `scores` (R, V)."""
    if top_k:
        scores, ids = scores.topk(min(top_k, scores.shape[1]))  # (R, K)
    cumulative = filtered_weights(scores, [row.sampling for row in rows]).cumsum(-1)  # (R, K)
    draws = [uniform(row.sampling.seed, row.candidate, len(row.ids)) for row in rows]
    noise = column(draws, scores, torch.float64)  # (R, 1)
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
    temperature = column([max(s.temperature, 1e-30) for s in settings], scores)
    scores.sub_(scores.amax(-1, keepdim=True)).div_(temperature)  # the best is 0
    weights = scores.exp().mul_(WEIGHT_OF_THE_BEST)  # fractions are cut off below
    bound = lower_bound(scores, settings)
    if bound is not None:
        # In place, `ge_` gives 0.0 and 1.0: a third of the time that a mask of bools takes.
        weights.mul_(scores.ge_(bound))
    return weights.long()


def lower_bound(scores: Tensor, settings: Sequence[Sampling]) -> Tensor | None:
    """The lowest score (R, 1) that top-p and min-p allow, None where no row has either.

    The best of `scores` (R, K) is 0, so min-p's bound is its logarithm.
    """
    with_top_p = [i for i, s in enumerate(settings) if s.top_p < 1]
    if not with_top_p and not any(s.min_p for s in settings):
        return None
    bound = column([log(s.min_p) if s.min_p else -inf for s in settings], scores)
    if with_top_p:
        top_p = column([settings[i].top_p for i in with_top_p], scores, torch.float64)
        in_nucleus = nucleus(select_rows(scores, with_top_p), top_p)
        bound[with_top_p] = in_nucleus.maximum(bound[with_top_p])
    return bound


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


def column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One number a row (R, 1), on the device of `like`."""
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]
