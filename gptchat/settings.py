"""Settings declared once, with default, meaning and rules, and checked when they are read.

A field of a dataclass that `setting` declares is a key of a table. `build` makes the dataclass of a
parsed table: every key must be known, of its field's type, and obey its rules. What is wrong is a
UserError of one line that says where it is, what was found and what is wanted.
"""

import dataclasses
import math
import operator
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gptchat.console import UserError

T = TypeVar("T")

# The rules of a setting: name -> (test of a value against the rule's bound, how an error says it).
RULES: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "choices": (lambda value, choices: value in choices, "one of"),
    "min": (operator.ge, "at least"),
    "max": (operator.le, "at most"),
    "above": (operator.gt, "a value above"),
    "below": (operator.lt, "a value below"),
}

# Keys that had another name in earlier versions, with the name that they have now.
RENAMED = {
    "accumulation": "gradient_accumulation_steps",
    "warmup_rate": "warmup_ratio",
    "final_rate": "min_lr_ratio",
}


def setting(default: Any, meaning: str, **rules: Any) -> Any:
    """A key of a config table: its default, its meaning in one line, and `RULES` for its values."""
    assert rules.keys() <= RULES.keys()
    return dataclasses.field(default=default, metadata={"help": meaning, **rules})


def build(cls: type[T], values: dict[str, Any], source: str, section: str = "") -> T:
    """An instance of the dataclass `cls` from a parsed table, with every key and value checked.

    A field that is itself a dataclass is a table in the table. Other fields are of type bool, int,
    float (an int will do) or str, or a tuple of any number of strings or floats (one alone will
    do), and are declared with `setting`; a rule holds for every item of a tuple. Raises UserError
    for an unknown key, another type or a value that breaks one of the field's `RULES`; its line
    begins with `source`, the file and overrides that the table comes from, and `section`, the
    table's name.
    """
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        place = f"{source}: [{section}] {key}" if section else f"{source}: {key}"
        if key not in fields:
            raise UserError(f"{place}: {_describe_unknown_key(key, list(fields))}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(f"{place}: found {value!r}; wanted a section [{key}]")
            arguments[key] = build(types[key], value, source, section=key)
        else:
            arguments[key] = _convert(value, types[key], place)
            _check_rules(arguments[key], fields[key].metadata, place)
    return cls(**arguments)


def _describe_unknown_key(key: str, known: Sequence[str]) -> str:
    """What an error says of a key that no field has: its new name if it was renamed."""
    if key in RENAMED and RENAMED[key] in known:
        return f"renamed; the key is now called {RENAMED[key]}"
    return f"unknown key; wanted one of {', '.join(known)}"


def _convert(value: Any, wanted: Any, place: str) -> Any:
    """The value as a field of type `wanted` holds it."""
    if typing.get_origin(wanted) is tuple:
        items = value if isinstance(value, list) else [value]
        item_type = typing.get_args(wanted)[0]
        kind, types = ("string", (str,)) if item_type is str else ("number", (int, float))
        if not all(type(item) in types for item in items):
            raise UserError(f"{place}: found {value!r}; wanted a {kind} or a list of {kind}s")
        return tuple(_convert(item, item_type, place) for item in items)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:  # not isinstance, which takes True for an int
        raise UserError(f"{place}: found {value!r}; wanted a value of type {wanted.__name__}")
    if wanted is float and not math.isfinite(value):
        raise UserError(f"{place}: found {value!r}; wanted a finite value of type float")
    return value


def _check_rules(value: Any, metadata: typing.Mapping[str, Any], place: str) -> None:
    items = value if isinstance(value, tuple) else (value,)
    for rule, (obeys, description) in RULES.items():
        if rule in metadata and not all(obeys(item, metadata[rule]) for item in items):
            raise UserError(f"{place}: found {value!r}; wanted {description} {metadata[rule]}")
