"""A request's JSON body, checked by its declaration.

A declaration is a msgspec Struct, of which `routes.py` also makes the OpenAPI description. A key
with the value null counts as not given. Whatever is wrong with a request raises a `Refusal`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import msgspec

# The names of one setting. On OpenAI's paths the first one given counts; the original's API takes
# only one.
SYNONYMS = {
    "max_new_tokens": ("max_completion_tokens", "max_tokens", "max_new_tokens", "n_predict"),
    "n": ("n", "num_return_sequences"),
    "min_tokens": ("min_tokens", "min_new_tokens"),
    "repetition_penalty": ("repetition_penalty", "repeat_penalty"),
    "stop": ("stop", "stop_sequences", "stop_sequence", "stopping_strings"),
}


@dataclass(eq=False)
class Refusal(Exception):
    """The answer to a request that cannot be served: a status, a line of text, OpenAI's fields."""

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None


def parse(body: Any) -> dict[str, Any]:
    """The body's object without its nulls. TorchServe leaves a body that is not JSON as bytes."""
    if isinstance(body, bytes | bytearray):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the body is not JSON: {str(error)[:80]}") from None
    if not isinstance(body, dict):
        raise Refusal(f"the body is {json.dumps(body):.60}: no JSON object")
    return {key: value for key, value in body.items() if value is not None}


def check(declared: type[msgspec.Struct], body: dict[str, Any]) -> Any:
    """The body as declared; a synonym's value is under the setting's own name.

    Unknown fields are left out, or refused if the declaration forbids them.
    """
    is_strict = declared.__struct_config__.forbid_unknown_fields
    given = [name for name in declared.__struct_fields__ if name in body]
    unknown = [name for name in body if name not in declared.__struct_fields__]
    if unknown and is_strict:
        message = f"{unknown[0]!r:.60} is unknown here, or more than this model can do"
        raise Refusal(message, param=f"{unknown[0]:.60}")
    for name in given:
        _check_characters(name, body[name])
    try:
        asked = msgspec.convert({name: body[name] for name in given}, declared)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _refusal(str(error), body) from None
    for setting, names in SYNONYMS.items():
        found = [name for name in names if name in given]
        if len(found) > 1 and is_strict:
            message = f"wanted one of {', '.join(found)}: they are the same"
            raise Refusal(message, param=found[0])
        if found:
            setattr(asked, setting, getattr(asked, found[0]))
    return asked


def _check_characters(name: str, value: Any) -> None:
    """JSON's escapes can write half of a surrogate pair, which no UTF-8 can encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        message = f"{name} holds {half}, half of a surrogate pair; wanted whole characters"
        raise Refusal(message, param=name) from None


def _refusal(problem: str, body: Any) -> Refusal:
    """What msgspec says, such as "Expected `int` <= 16 - at `$.n`", with the value found there."""
    problem, _, place = problem.replace("Expected", "wanted").partition(" - at ")
    steps = re.findall(r"\.(\w+)|\[(\d+)\]", place)
    if not steps:
        missing = re.search("required field `(.+)`", problem)
        return Refusal(problem, param=missing[1] if missing else None)
    found = body
    for name, index in steps:
        found = found[name] if name else found[int(index)]
    path = place.partition("$.")[2].strip("`").removesuffix("[...]")
    return Refusal(f"{path} is {found!r:.60}: {problem}", param=steps[0][0])
