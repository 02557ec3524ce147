"""The part of JSON Schema that the server's description uses: `problem` says why a value does not
fit a schema, `values` draws values that do, for hypothesis.
"""

import re
from typing import Any

from hypothesis import strategies as st

TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}
Schema = dict[str, Any]


class Schemas:
    """The schemas of one description; `texts` draws its strings."""

    def __init__(self, description: Schema, texts: st.SearchStrategy[str]):
        self.named = description["components"]["schemas"]
        self.texts = texts

    def resolve(self, schema: Schema) -> Schema:
        if "$ref" in schema:
            return self.named[schema["$ref"].rpartition("/")[2]]
        return schema

    # --- checking

    def fits(self, schema: Schema, value: Any) -> bool:
        return self.problem(schema, value) == ""

    def problem(self, schema: Schema, value: Any, place: str = "") -> str:
        """Where and why a value does not fit; "" if it does."""
        schema = self.resolve(schema)
        if "anyOf" in schema:
            problems = [self.problem(option, value, place) for option in schema["anyOf"]]
            return "" if "" in problems else "; ".join(problems)
        if "const" in schema and value != schema["const"]:
            return f"{place}: not {schema['const']!r}"
        if "enum" in schema and value not in schema["enum"]:
            return f"{place}: none of {schema['enum']}"
        if "type" not in schema:
            return ""
        kind = schema["type"]
        is_bool = isinstance(value, bool)
        if not isinstance(value, TYPES[kind]) or is_bool != (kind == "boolean"):
            return f"{place}: not of type {kind}"
        if kind in ("integer", "number"):
            low, high = schema.get("minimum", value), schema.get("maximum", value)
            return "" if low <= value <= high else f"{place}: not from {low} to {high}"
        return self._length_problem(schema, value, place) or self._part_problem(
            schema, value, place
        )

    def _length_problem(self, schema: Schema, value: Any, place: str) -> str:
        bounds = ("minLength", "maxLength"), ("minItems", "maxItems"), ("", "maxProperties")
        for low, high in bounds:
            if low in schema and len(value) < schema[low]:
                return f"{place}: shorter than {schema[low]}"
            if high in schema and len(value) > schema[high]:
                return f"{place}: longer than {schema[high]}"
        return ""

    def _part_problem(self, schema: Schema, value: Any, place: str) -> str:
        """Of an array's items or an object's keys."""
        problems = []
        if schema["type"] == "array":
            for index, item in enumerate(value):
                problems.append(self.problem(schema.get("items", {}), item, f"{place}[{index}]"))
        elif schema["type"] == "object":
            properties = schema.get("properties", {})
            missing = [name for name in schema.get("required", ()) if name not in value]
            problems += [f"{place}.{name}: missing" for name in missing]
            for name, item in value.items():
                if name in properties:
                    problems.append(self.problem(properties[name], item, f"{place}.{name}"))
                    continue
                others = schema.get("additionalProperties", True)
                if others is False:
                    problems.append(f"{place}.{name}: unknown")
                elif isinstance(others, dict):
                    problems.append(self._name_problem(schema["propertyNames"], name, place))
                    problems.append(self.problem(others, item, f"{place}.{name}"))
        return "; ".join(filter(None, problems))

    def _name_problem(self, names: Schema, name: str, place: str) -> str:
        """Of the key of an object whose keys are numbers."""
        if re.fullmatch(names["pattern"], name) and int(name) <= names["x-maximum"]:
            return ""
        return f"{place}.{name}: no number up to {names['x-maximum']}"

    # --- drawing

    def values(self, schema: Schema) -> st.SearchStrategy[Any]:
        """Values that fit, small ones and both ends of each range above all."""
        schema = self.resolve(schema)
        if "anyOf" in schema:
            return st.one_of([self.values(option) for option in schema["anyOf"]])
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        if "type" not in schema:
            return st.none() | st.booleans() | st.integers() | self.texts
        kind = schema["type"]
        if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
            keys = st.integers(0, schema["propertyNames"]["x-maximum"]).map(str)
            values = self.values(schema["additionalProperties"])
            return st.dictionaries(keys, values, max_size=3)
        if kind == "object":
            return self.objects(schema)
        if kind == "array":
            most = min(schema.get("maxItems", 3), schema.get("minItems", 0) + 2)
            items = self.values(schema["items"])
            return st.lists(items, min_size=schema.get("minItems", 0), max_size=most)
        if kind == "string":
            low, high = schema.get("minLength", 0), schema.get("maxLength", 1000)
            return self.texts.map(lambda text: text[:high]).filter(lambda text: len(text) >= low)
        return self._numbers(kind, schema)

    def _numbers(self, kind: str, schema: Schema) -> st.SearchStrategy[Any]:
        low, high = schema.get("minimum"), schema.get("maximum")
        if kind == "boolean":
            return st.booleans()
        if kind == "null":
            return st.none()
        ends = st.sampled_from([low, high])
        if kind == "integer":
            return st.integers(low, high) | ends
        return st.floats(low, high) | ends

    def objects(self, schema: Schema) -> st.SearchStrategy[dict[str, Any]]:
        """Objects with all required keys, a few others, and one key at most of each x-setting."""

        def without_doubles(drawn: dict[str, Any]) -> dict[str, Any]:
            kept: dict[str, str] = {}
            for name in drawn:
                kept[properties[name].get("x-setting", name)] = name
            return {name: drawn[name] for name in kept.values()}

        properties = schema.get("properties", {})
        required = schema.get("required", [])
        optional = sorted(properties.keys() - set(required))
        strategies = {name: self.values(properties[name]) for name in properties}
        chosen = st.just([])
        if optional:
            chosen = st.lists(st.sampled_from(optional), max_size=5, unique=True)
        return chosen.flatmap(
            lambda names: st.fixed_dictionaries(
                {name: strategies[name] for name in [*required, *names]}
            )
        ).map(without_doubles)
