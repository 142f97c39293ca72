"""Normalize JSON schemas: all constraints on a value are merged in one place.

A schema can spread the constraints on a value over ``allOf``, ``$ref``, ``anyOf`` and their siblings. Here they are
merged, value by value, so that the properties of each object are known: objects are closed, that is, have no properties
beyond those that the schema names, unless it says otherwise (`docs/structured-output.md`). The result is equivalent to
the schema or stricter, so every value that matches it matches the schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any, NamedTuple

from aria.grammars import exclusive
from aria.grammars.keywords import (
    CONSTRAINING,
    KEYWORD_TYPES,
    TYPES,
    Resources,
    SchemaError,
    enumerate_names,
    equality_key,
)
from aria.grammars.numbers import EXACT, numeric
from aria.grammars.trampoline import Steps, run

MAX_STEPS = 500_000
"""Units of work for one schema, about a microsecond each: nested alternatives multiply."""
MAX_SELECTIONS = 512
"""Combinations of optional properties to enumerate for minProperties and maxProperties."""
MAX_CHAIN = 200
"""Length of a chain of references and ``allOf``."""
MAX_PATTERNS = 8
"""Patterns and formats on one string: finding out whether any string matches all takes exponential time."""
_INLINE = 16
"""Nesting depth of inline values. Deeper ones become definitions, because JSON parsers limit nesting."""


class SchemaPart(NamedTuple):
    """The constraints of one subschema on a value, without the keywords that are already handled."""

    node: dict[str, Any]
    without: frozenset[str] = frozenset()

    def has(self, *names: str) -> bool:
        return any(name in self.node and name not in self.without for name in names)

    def get(self, name: str, default: Any = None) -> Any:
        return default if name in self.without else self.node.get(name, default)


def normalize(schema: Any) -> Any:
    """Normalize a schema, with closed objects.

    Args:
        schema: Freshly parsed JSON, which is modified.

    Returns:
        True, or a schema made of ``anyOf``, ``$ref`` to its ``$defs``, ``enum``, ``x-number`` (a pattern of numbers;
        see :mod:`aria.grammars.numbers`), or one ``type`` with its own keywords. Some with a type also have ``allOf``.

    Raises:
        ValueError: Not a JSON schema, an unsupported keyword (named with its place), or no value matches it.
    """
    normalizer = SchemaNormalizer(Resources(schema))
    found = run(normalizer.value([schema]))
    if found is False:
        where = f"; the constraints at {normalizer.unfit} contradict each other" if normalizer.unfit else ""
        raise ValueError(f"no JSON value matches it{where}")
    return found if found is True else {**found, "$defs": normalizer.definitions}


class SchemaNormalizer:
    """Normalizes the values of one schema."""

    def __init__(self, resources: Resources):
        self.resources = resources
        self._names: dict[Any, str] = {}
        self._found: dict[Any, Any] = {}
        self._active: set[Any] = set()
        self._names_within: dict[int, set[str]] = {}
        self._steps = 0
        self.unfit: str | None = None
        """The first place that no value matches."""
        self.definitions: dict[str, Any] = {}

    def value(self, schemas: Sequence[Any]) -> Steps:
        """Normalize a value constrained by all of these schemas; for :func:`aria.grammars.trampoline.run`."""
        parts = self.parts(schemas)
        if parts is None:
            return False
        if not parts:
            return True
        key = tuple((id(part.node), part.without) for part in parts)
        if key in self._active or self._names.get(key) in self.definitions:
            return self._reference(key)
        if key in self._found:
            return self._shared(key)  # nested alternatives often lead to the same value
        self.work(8 * len(parts))
        deep = len(self._active) % _INLINE == _INLINE - 1
        self._active.add(key)
        found = yield self._described(parts)
        self._active.remove(key)
        if found is False and self.unfit is None:
            self.unfit = self.resources.place(parts[0].node)
        self._found[key] = found
        # The target of a reference may be recursive, or used in many places.
        behind_reference = any(isinstance(schema, dict) and "$ref" in schema for schema in schemas)
        return self._shared(key) if key in self._names or behind_reference or deep else found

    def _shared(self, key: Any) -> Any:
        """The result for a value, as a reference if it is larger than a reference."""
        found = self._found[key]
        if key not in self._names and not (isinstance(found, dict) and found.keys() & {"anyOf", "type", "allOf"}):
            return found
        reference = self._reference(key)
        self.definitions[self._names[key]] = found
        return reference

    def work(self, steps: int) -> None:
        """Count units of work.

        Raises:
            ValueError: Over the limit.
        """
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise ValueError("it is too complex: merging the constraints on its values takes too long")

    def _reference(self, key: Any) -> dict[str, str]:
        return {"$ref": f"#/$defs/{self._names.setdefault(key, f'd{len(self._names)}')}"}

    def parts(self, schemas: Iterable[Any]) -> list[SchemaPart] | None:
        """All constraints on a value outside of alternatives; None if no value matches."""
        found: dict[Any, SchemaPart] = {}
        nothing: frozenset[int] = frozenset()
        waiting = [(schema, nothing) for schema in schemas][::-1]
        while waiting:
            one, above = waiting.pop()
            if isinstance(one, bool):
                if not one:
                    return None
                continue
            part = one if isinstance(one, SchemaPart) else SchemaPart(one)
            key = id(part.node), part.without
            self.resources.clean(part.node)
            if id(part.node) in above:
                raise SchemaError(self.resources.place(part.node), "$ref is circular: no JSON value matches it")
            if key in found:
                continue
            found[key] = part
            above |= {id(part.node)}
            if len(above) > MAX_CHAIN:
                place = self.resources.place(part.node)
                raise SchemaError(place, f"a chain of over {MAX_CHAIN} references; refer to the last directly")
            if part.has("$ref"):
                waiting.append((self.resources.target(part.node), above))
            if part.has("allOf"):
                waiting += [(schema, above) for schema in reversed(part.node["allOf"])]
        return [part for part in found.values() if any(part.has(name) for name in part.node if name in CONSTRAINING)]

    def types(self, parts: Sequence[SchemaPart]) -> set[str]:
        """Types that are allowed; "number" implies "integer"."""
        left = set(TYPES)
        for part in parts:
            if (said := part.get("type")) is not None:
                said = {said} if isinstance(said, str) else set(said)
                left &= said | ({"integer"} if "number" in said else set())
        if not any(part.has("type", "const", "enum") for part in parts):
            if any(part.has("properties", "patternProperties") for part in parts):
                left = {"object"}
            elif any(part.has("items", "prefixItems") for part in parts):
                left = {"array"}
        return left - {"integer"} if "number" in left else left

    def _described(self, parts: list[SchemaPart]) -> Steps:
        for part in parts:
            for name in ("anyOf", "oneOf"):
                if part.has(name):
                    return (yield self._alternatives(parts, part, name))
        types = self.types(parts)
        if any(part.has("const", "enum") for part in parts):
            return (yield from self._enumerated(parts, types))
        if "type" not in {name for part in parts for name in part.node} and not self._with_keywords(
            parts, KEYWORD_TYPES
        ):
            return True
        options = []
        for name in TYPES:
            if name in types:
                options.append((yield from self._typed(parts, name)))
        return any_of(options)

    def _with_keywords(self, parts: Sequence[SchemaPart], names: Iterable[str]) -> list[SchemaPart]:
        return [part for part in parts if part.has(*names)]

    def _alternatives(self, parts: list[SchemaPart], at: SchemaPart, name: str) -> Steps:
        # allOf and $ref are already expanded.
        rest = [
            SchemaPart(part.node, part.without | {"allOf", "$ref"} | ({name} if part is at else set()))
            for part in parts
        ]
        branches = [[branch] for branch in at.node[name]]
        if name == "oneOf":
            branches = exclusive.branches(self, branches, self.resources.place(at.node))
        keys = list(at.node)
        first = "properties" not in keys or keys.index(name) < keys.index("properties")
        # Keep properties in the order of the schema.
        options = []
        for branch in branches:
            options.append((yield self.value([*branch, *rest] if first else [*rest, *branch])))
        return any_of(options)

    def _enumerated(self, parts: list[SchemaPart], types: set[str]) -> Steps:
        """Values of const and enum that match all other constraints."""
        lists = [[part.get("const")] if part.has("const") else part.get("enum") for part in parts
                 if part.has("const", "enum")]  # fmt: skip
        lists += [part.get("enum") for part in parts if part.has("const") and part.has("enum")]
        left = {equality_key(value): value for value in lists[0]}
        for more in lists[1:]:
            left = {key: left[key] for value in more if (key := equality_key(value)) in left}
        options = []
        for name in TYPES:
            values = [value for value in left.values() if type_of(value) == name and (name in types or
                      (name == "integer" and "number" in types))]  # fmt: skip
            if name in ("integer", "number"):
                kept = [value for value in values if self._in_bounds(parts, value)]
                options += [_constant(value) for value in kept]
            elif name in ("string", "array", "object") and values:
                own = self._with_keywords(parts, [keyword for keyword, of in KEYWORD_TYPES.items() if of == name])
                if own and any(_is_large(value) for value in values):
                    place = self.resources.place(parts[0].node)
                    raise SchemaError(
                        place, "numbers beyond 2^53 in const and enum are not supported beside properties or items"
                    )
                said = (yield from self._typed(own, name, closed=False)) if own else True
                if said is not True:
                    options.append({"allOf": [said, {"enum": values}]})
                else:
                    options += [_constant(value) for value in values]
            else:
                options += [_constant(value) for value in values]
        return any_of(options)

    def _in_bounds(self, parts: list[SchemaPart], value: float) -> bool:
        exact = Fraction(value)
        return all(
            (not part.has("minimum") or exact >= Fraction(part.get("minimum")))
            and (not part.has("maximum") or exact <= Fraction(part.get("maximum")))
            and (not part.has("exclusiveMinimum") or exact > Fraction(part.get("exclusiveMinimum")))
            and (not part.has("exclusiveMaximum") or exact < Fraction(part.get("exclusiveMaximum")))
            and (not part.has("multipleOf") or Fraction(str(value)) % Fraction(str(part.get("multipleOf"))) == 0)
            for part in parts
        )

    # Values of one type

    def _typed(self, parts: Sequence[SchemaPart], name: str, *, closed: bool = True) -> Steps:
        if name in ("integer", "number"):
            try:
                return numeric([{key: part.node[key] for key in part.node if part.has(key)} for part in parts],
                               name == "integer")  # fmt: skip
            except ValueError as error:
                raise SchemaError(self.resources.place(parts[0].node), str(error)) from None
        if name == "string":
            return self._string(parts)
        if name == "array":
            return (yield from self._array(parts))
        return (yield from self._object(parts, closed)) if name == "object" else {"type": name}

    def _string(self, parts: Sequence[SchemaPart]) -> Any:
        found: dict[str, Any] = {"type": "string", **_sizes(parts, "minLength", "maxLength")}
        if found.get("minLength", 0) > found.get("maxLength", math.inf):
            return False
        said = dict.fromkeys((key, part.get(key)) for key in ("pattern", "format") for part in parts if part.has(key))
        if len(said) > MAX_PATTERNS:
            place = self.resources.place(parts[0].node)
            raise SchemaError(place, f"{len(said)} patterns and formats of one text; expected at most {MAX_PATTERNS}")
        if len({key for key, _ in said}) == len(said):
            return found | dict(iter(said))
        return {"allOf": [found, *({"type": "string", key: value} for key, value in said)]}

    def _array(self, parts: Sequence[SchemaPart]) -> Steps:
        found: dict[str, Any] = {"type": "array", **_sizes(parts, "minItems", "maxItems")}
        lists = [(part.get("prefixItems", []), part.get("items", True)) for part in parts]
        prefix = []
        items = yield self.value([items for _, items in lists])
        for i in range(max((len(own) for own, _ in lists), default=0)):
            prefix.append((yield self.value([own[i] if i < len(own) else items for own, items in lists])))
            if prefix[-1] is False:
                prefix, items = prefix[:-1], False
                break
        if items is False:
            found["maxItems"] = min(found.get("maxItems", len(prefix)), len(prefix))
        if found.get("minItems", 0) > found.get("maxItems", math.inf):
            return False
        return {**found, **({"prefixItems": prefix} if prefix else {}), "items": items}

    def _object(self, parts: Sequence[SchemaPart], closed: bool) -> Steps:
        names = dict.fromkeys(name for part in parts for name in part.get("properties", ()))
        required = dict.fromkeys(name for part in parts for name in part.get("required", ()))
        patterns = dict.fromkeys(pattern for part in parts for pattern in part.get("patternProperties", ()))
        for pattern in list(patterns):
            if (few := enumerate_names(pattern)) is not None:
                names |= dict.fromkeys(few)
                del patterns[pattern]
        names |= required  # once each: reading twice at every level would take exponential time
        self.work(len(parts) * len(names))
        properties = {}
        for name in names:
            properties[name] = yield self.value(self.property_schemas(parts, name))
        others: Any = [part.get("additionalProperties") for part in parts if part.has("additionalProperties")]
        others += [part.get("unevaluatedProperties") for part in parts
                   if part.has("unevaluatedProperties") and not part.has("additionalProperties")]  # fmt: skip
        named = required or any(part.has("properties", "patternProperties") for part in parts)
        others = (yield self.value(others)) if others else not (named and closed)
        found = {"type": "object", "additionalProperties": others}
        if patterns:
            found["patternProperties"] = said = {}
            for pattern in patterns:
                said[pattern] = yield self.value(self.property_schemas(parts, pattern, is_pattern=True))
        for name in [name for name, value in properties.items() if value is False and name not in patterns]:
            if name in required:
                return False
            if others is False and not patterns:
                del properties[name]
        found |= {"properties": properties, "required": list(required)}
        sizes = _sizes(parts, "minProperties", "maxProperties")
        return self._counted(found, sizes, parts) if sizes else found

    def property_schemas(self, parts: Sequence[SchemaPart], name: str, *, is_pattern: bool = False) -> list[Any]:
        """All schemas that apply to a property, or to those that match a pattern."""
        said = []
        self.work(len(parts))
        for part in parts:
            own = [] if is_pattern or name not in part.get("properties", ()) else [part.node["properties"][name]]
            place = self.resources.place(part.node)
            for pattern, schema in part.get("patternProperties", {}).items():
                self.work(0 if is_pattern else 10)
                if pattern == name if is_pattern else self.resources.matches(pattern, name, place):
                    own.append(schema)
            if not own and part.has("additionalProperties"):
                own.append(part.get("additionalProperties"))
            elif (
                part.has("unevaluatedProperties")
                and not part.has("additionalProperties")
                and not own
                and name not in self._names_of(part.node)
            ):
                own.append(part.get("unevaluatedProperties"))
            said += own
        return said

    def _names_of(self, schema: dict[str, Any]) -> set[str]:
        """Properties and patterns that a schema names, including through allOf, anyOf, oneOf and $ref."""
        if id(schema) in self._names_within:
            return self._names_within[id(schema)]
        found: set[str] = set()
        seen: set[int] = set()
        waiting: list[Any] = [schema]
        while waiting:
            one = waiting.pop()
            if isinstance(one, bool) or id(one) in seen:
                continue
            seen.add(id(one))
            patterns = one.get("patternProperties", ())
            found |= {*one.get("properties", ()), *patterns}
            found |= {name for pattern in patterns for name in enumerate_names(pattern) or ()}
            waiting += [inner for key in ("allOf", "anyOf", "oneOf") for inner in one.get(key, ())]
            if "$ref" in one:
                waiting.append(self.resources.target(one))
        self.work(len(found) + len(seen))
        self._names_within[id(schema)] = found
        return found

    def _counted(self, found: dict[str, Any], sizes: dict[str, int], parts: Sequence[SchemaPart]) -> Any:
        """Apply minProperties and maxProperties."""
        place = self.resources.place(parts[0].node)
        properties, required = found["properties"], found["required"]
        optional = [name for name in properties if name not in required]
        least = max(sizes.get("minProperties", 0) - len(required), 0)
        most = sizes.get("maxProperties", math.inf) - len(required)
        if most < least:
            return False
        if found["additionalProperties"] is not False or "patternProperties" in found:
            if optional:
                raise SchemaError(
                    place,
                    "minProperties and maxProperties are not supported with both optional and additional properties",
                )
            if least > 1:
                raise SchemaError(
                    place, "minProperties is supported up to one additional property, because names may repeat"
                )
            return found | sizes
        if least > len(optional):
            return False
        if least == 0 and most >= len(optional):
            return found
        # Without a maximum, each combination stands for all that begin with it.
        counts = [least] if most >= len(optional) else list(range(least, int(most) + 1))
        if sum(math.comb(len(optional), count) for count in counts) > MAX_SELECTIONS:
            raise SchemaError(
                place, f"minProperties and maxProperties allow over {MAX_SELECTIONS} combinations of properties"
            )
        options = []
        for count in counts:
            for chosen in combinations(optional, count):
                self.work(len(properties))
                last = optional.index(chosen[-1]) if chosen else -1
                later = optional[last + 1 :] if most >= len(optional) else []
                kept = {name: value for name, value in properties.items() if name in (*required, *chosen, *later)}
                options.append({**found, "properties": kept, "required": [*required, *chosen]})
        return any_of(options)


def any_of(options: Iterable[Any]) -> Any:
    """The union of schemas."""
    left: list[Any] = []
    for option in options:
        if option is True:
            return True
        if option is not False:
            left += option.get("anyOf", [option])
    return {"anyOf": left} if len(left) > 1 else left[0] if left else False


def type_of(value: Any) -> str:
    """The type of a value; 1.0 is an integer."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "integer" if value == int(value) else "number"
    kinds = {bool: "boolean", str: "string", list: "array", dict: "object"}
    return "null" if value is None else kinds[type(value)]


def _is_large(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(map(_is_large, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and abs(value) > EXACT


def _constant(value: Any) -> dict[str, Any]:
    """A schema that matches one value."""
    if not _is_large(value):
        return {"enum": [value]}
    if isinstance(value, list):
        return {"type": "array", "prefixItems": [_constant(one) for one in value], "items": False,
                "minItems": len(value), "maxItems": len(value)}  # fmt: skip
    if isinstance(value, dict):
        return {"type": "object", "properties": {name: _constant(one) for name, one in value.items()},
                "required": list(value), "additionalProperties": False}  # fmt: skip
    return {"x-number": str(int(value))}


def _sizes(parts: Sequence[SchemaPart], least: str, most: str) -> dict[str, int]:
    """The tightest of the size limits."""
    found = {}
    if low := [int(part.get(least)) for part in parts if part.has(least)]:
        found[least] = max(low)
    if high := [int(part.get(most)) for part in parts if part.has(most)]:
        found[most] = min(high)
    return found
