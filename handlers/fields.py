"""The keys of a request's JSON body, each checked as it is taken out.

A bad request raises a `Refusal`, which is turned into the HTTP answer: a status, and a line that
names the key, what was found and what is wanted. Keys that were neither taken nor dropped are
refused at the end, so that no misspelt setting is ignored. A key with the value null counts as not
given, even an unknown one.
"""

import json
from collections.abc import Callable
from math import inf
from typing import Any

# Of a stop string or a forbidden word: the tables that find one grow with the square of its length.
MAX_WORD_CHARS = 200


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

    def name_used(self, *names: str) -> str:
        """Which of a setting's names the body uses; the first name if none."""
        for name in names:
            if name in self.values:
                return name
        return names[0]

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

    def drop(self, name: str) -> None:
        """Ignore a key."""
        self.values.pop(name, None)

    def refuse_untaken(self) -> None:
        """Raise Refusal if a key has not been taken."""
        for name in self.values:
            message = f"{name!r:.60} is unknown here, or more than this model can do"
            raise Refusal(message, param=f"{name:.60}")
