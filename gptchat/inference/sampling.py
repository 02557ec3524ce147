"""What a request may choose about how its tokens are drawn: the settings, declared once, with
range and help.

They mean what they mean in transformers' `generate` and in OpenAI's API; `draw.py` applies them.
(`whole_characters`, which neither has, is on unless it is 0: an answer is then the same wherever
theirs has no U+FFFD.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import inf
from typing import Any

import numpy as np

from gptchat.inference.text import WordFilter

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

    @cached_property
    def bias_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,), int64, and biases (n,), float32: those that `logit_bias` has at first use."""
        ids = np.fromiter(self.logit_bias.keys(), np.int64, len(self.logit_bias))
        biases = np.fromiter(self.logit_bias.values(), np.float32, len(self.logit_bias))
        return ids, biases


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
