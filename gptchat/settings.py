"""Settings: dataclass fields declared with default, help and allowed values, and their checking.

`setting` declares a field, `declared` lists those of a class. `Setting.check` checks one value,
`check_all` an instance, `build` a table from a file; `table` and `update_tables` document them in a
README.
"""

import dataclasses
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptchat.console import UserError

T = TypeVar("T")

KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {  # type: (its name, types of its items)
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("a string", (str,)),
    tuple[str, ...]: ("a string or a list of strings", (str,)),
    tuple[float, ...]: ("a number or a list of numbers", (int, float)),
}
RULES: dict[str, tuple[Callable[[Any, Any], bool], str]] = {  # name: (test, its name)
    "min": (operator.ge, "at least"),
    "max": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}
# In TOML "data\train.txt" holds a tab, and "data\lm.txt" is an error.
BACKSLASH_HINT = "wanted / in paths, or '' around them, where \\ is a backslash"


def setting(default: Any, help: str, may_change: bool = False, **rules: Any) -> Any:
    """A field of a dataclass: default, meaning, and `choices` or bounds from RULES.

    A resumed run may have another value of a config key that `may_change`.
    """
    assert rules.keys() <= {"choices", *RULES}
    metadata = {"help": help, "rules": rules, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """A declared setting. Its type is a key of KINDS; if `optional`, None is allowed, too."""

    name: str
    type: Any
    optional: bool
    default: Any
    help: str
    rules: Mapping[str, Any]

    @property
    def wanted(self) -> str:
        """The allowed values in words, such as "an integer, at least 1" or "a number, 0 to 1"."""
        if "choices" in self.rules:
            return "one of " + ", ".join(self.rules["choices"])
        if self.rules.keys() == {"min", "max"}:
            bounds = f"{self.rules['min']} to {self.rules['max']}"
        else:
            bounds = " and ".join(f"{RULES[name][1]} {bound}" for name, bound in self.rules.items())
        return ", ".join(filter(None, (KINDS[self.type][0], bounds)))

    def check(self, value: Any) -> Any:
        """The value as the field holds it. Raises ValueError: "found ...; wanted ..."."""
        if value is None and self.optional:
            return None
        is_tuple = typing.get_origin(self.type) is tuple
        items = list(value) if is_tuple and isinstance(value, list | tuple) else [value]
        if any(isinstance(item, str) and min(item, default=" ") < " " for item in items):
            raise ValueError(f"found {value!r:.80} with a control character; {BACKSLASH_HINT}")
        if not all(map(self._is_allowed, items)):
            raise ValueError(f"found {value!r:.80}; wanted {self.wanted}")
        item_type = typing.get_args(self.type)[0] if is_tuple else self.type
        checked = [float(item) if item_type is float else item for item in items]
        return tuple(checked) if is_tuple else checked[0]

    def _is_allowed(self, item: Any) -> bool:
        types = KINDS[self.type][1]
        if not isinstance(item, types) or (isinstance(item, bool) and bool not in types):
            return False
        if isinstance(item, float) and not math.isfinite(item):
            return False
        if "choices" in self.rules:
            return item in self.rules["choices"]
        return all(RULES[name][0](item, bound) for name, bound in self.rules.items())


@functools.cache
def declared(cls: Any) -> dict[str, Setting]:
    """The settings of a dataclass by name; other fields are left out."""
    hints = typing.get_type_hints(cls)
    settings = {}
    for field in dataclasses.fields(cls):
        if "rules" in field.metadata:
            hint = hints[field.name]
            optional = isinstance(hint, types.UnionType)  # int | None
            if optional:
                hint = typing.get_args(hint)[0]
            rules, help = field.metadata["rules"], field.metadata["help"]
            settings[field.name] = Setting(field.name, hint, optional, field.default, help, rules)
    return settings


def check_all(instance: Any) -> None:
    """Check every setting of a dataclass's instance.

    Raises ValueError: "name: found ...; wanted ...".
    """
    for name, one in declared(type(instance)).items():  # type: ignore[arg-type]
        try:
            one.check(getattr(instance, name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def build(cls: type[T], values: dict[str, Any], source: str, section: str = "") -> T:
    """An instance of the dataclass `cls` from a parsed table.

    A field that is itself a dataclass is a table in the table. Raises UserError for an unknown key
    or a value that is not allowed, with `source`, where the table comes from, and `section`, its
    name.
    """
    settings = declared(cls)  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        place = f"{source}: [{section}] {key}" if section else f"{source}: {key}"
        if key in settings:
            try:
                arguments[key] = settings[key].check(value)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None
        elif key not in hints:
            raise UserError(f"{place}: unknown key; wanted one of {', '.join(hints)}")
        elif not isinstance(value, dict):
            raise UserError(f"{place}: found {value!r:.80}; wanted a section [{key}]")
        else:
            arguments[key] = build(hints[key], value, source, section=key)
    return cls(**arguments)


def table(cls: type, leave_out: Collection[str] = ()) -> str:
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, one in declared(cls).items():
        if name not in leave_out:
            rows.append(f"| `{name}` | {one.wanted} | `{json.dumps(one.default)}` | {one.help} |")
    return "\n".join(rows)


def update_tables(path: Path, tables: Mapping[str, str]) -> None:
    """Replace each table between `<!-- table: NAME -->` and `<!-- end -->` in a Markdown file."""
    text = path.read_text(encoding="utf-8")
    for name, content in tables.items():
        start = f"<!-- table: {name} -->\n"
        assert start in text, f"{path} has no marker of the table {name}"
        before, behind = text.split(start)
        end = behind.index("\n<!-- end -->")
        text = before + start + content + behind[end:]
    path.write_text(text, encoding="utf-8")
