"""The keys of a request's JSON body, each checked as it is taken out.

A bad request raises a `Refusal`, which is turned into the HTTP answer: a status, and a line that
names the key, what was found and what is wanted. What becomes of keys that were not taken, the
caller decides: the original's API refuses them, so that no misspelt setting is ignored
(`refuse_untaken`), OpenAI's ignores most (`unread.py`). A key with the value null counts as not
given, even an unknown one.
"""

import json
import re
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

from gptchat.inference.sampling import LARGEST_BIAS

# Of a stop string or a forbidden word: the tables that find one grow with the square of its length.
MAX_WORD_CHARS = 200
TOKEN_ID = "0|[1-9][0-9]{0,8}"  # as JSON writes one that is a key


class Refusal(Exception):
    """A request that is answered with `status` and a reason; the rest is as in OpenAI's errors."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code


def is_text(value: Any) -> bool:
    """Whether UTF-8 can encode it: JSON's escapes can also write half a surrogate pair."""
    if not isinstance(value, str):
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def is_word(value: Any) -> bool:
    """Whether it can be a stop string or a forbidden word."""
    return is_text(value) and 0 < len(value) <= MAX_WORD_CHARS


def is_list(value: Any, is_item: Callable[[Any], bool], longest: float = inf) -> bool:
    """Whether it is a list of 1 to `longest` such items."""
    return isinstance(value, list) and 0 < len(value) <= longest and all(map(is_item, value))


class Fields:
    """The keys and values of one body. Raises Refusal if the body or a value is not as wanted."""

    def __init__(self, body: Any):
        if isinstance(body, bytes | bytearray):  # TorchServe could not parse it
            try:
                body = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise Refusal(f"the body is not JSON: {str(error)[:80]}") from None
        if not isinstance(body, dict):
            raise Refusal("the body is no JSON object")
        self.values = {key: value for key, value in body.items() if value is not None}

    def take(
        self, name: str, is_valid: Callable[[Any], bool], wanted: str, default: Any = None
    ) -> Any:
        """The value of a key, which `wanted` describes; `default` where it is not given."""
        if name not in self.values:
            return default
        value = self.values.pop(name)
        if not is_valid(value):
            raise Refusal(f"{name} is {value!r:.60}, wanted {wanted}", param=name)
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> Any:
        def is_valid(value: Any) -> bool:
            return type(value) is int and low <= value <= high

        return self.take(name, is_valid, f"an integer, {low} to {high}", default)

    def integers(self, names: Sequence[str], low: int, high: int) -> list[int]:
        """The values of a setting under those of its names that are given, in this order."""
        values = [self.integer(name, low, high) for name in names]
        return [value for value in values if value is not None]

    def number(self, name: str, low: float, high: float, default: float) -> float:
        def is_valid(value: Any) -> bool:
            return type(value) in (int, float) and low <= value <= high

        return float(self.take(name, is_valid, f"a number, {low} to {high}", default))

    def flag(self, name: str) -> bool:
        return self.take(name, lambda value: type(value) is bool, "true or false", False)

    def words(self, name: str, longest: int) -> tuple[str, ...]:
        """One such string, or a list of at most `longest` (possibly none), as a tuple."""

        def is_valid(value: Any) -> bool:
            # `is_list` refuses an empty list.
            return is_word(value) or value == [] or is_list(value, is_word, longest)

        wanted = f"a string of 1 to {MAX_WORD_CHARS} characters, or up to {longest} in a list"
        value = self.take(name, is_valid, wanted, [])
        return (value,) if isinstance(value, str) else tuple(value)

    def biases(self, name: str, vocab_size: int, most: int) -> dict[int, float]:
        """A number for each of at most `most` token ids, which JSON can only write as strings."""

        def is_id(key: Any) -> bool:
            return bool(re.fullmatch(TOKEN_ID, str(key))) and int(key) < vocab_size

        def is_bias(value: Any) -> bool:
            return type(value) in (int, float) and -LARGEST_BIAS <= value <= LARGEST_BIAS

        def is_valid(value: Any) -> bool:
            if not isinstance(value, dict) or len(value) > most:
                return False
            return all(map(is_id, value)) and all(map(is_bias, value.values()))

        wanted = f"numbers from {-LARGEST_BIAS} to {LARGEST_BIAS} for up to {most} token ids"
        value = self.take(name, is_valid, f"{wanted} below {vocab_size}", {})
        return {int(id): float(bias) for id, bias in value.items()}

    def refuse_untaken(self) -> None:
        """Raise Refusal if a key has not been taken."""
        for name in self.values:
            message = f"{name!r:.60} is unknown here, or more than this model can do"
            raise Refusal(message, param=f"{name:.60}")
