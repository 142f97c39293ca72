"""Alternatives of ``oneOf``. Grammars cannot express "and none of the others", so alternatives must be disjoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aria.grammars import keywords, numbers

if TYPE_CHECKING:
    from aria.grammars.schemas import SchemaNormalizer, SchemaPart

MAX_COMPARED = 128
_DEPTH = 3
_TYPES = {"NoneType": "null", "bool": "boolean", "str": "string", "list": "array", "object": "object"}
"""Types by the keys of `keywords.equality_key`; numbers are distinguished by their value."""


def branches(normalizer: SchemaNormalizer, given: Sequence[list[Any]], place: str) -> list[list[Any]]:
    """The alternatives that can match, made disjoint.

    Raises:
        SchemaError: A value may match two of them.
    """
    possible = [(branch, parts) for branch in given if (parts := normalizer.parts(branch)) is not None]
    if len(possible) < 2:
        return [branch for branch, _ in possible]
    if (tag := _tag(normalizer, [parts for _, parts in possible])) is not None:
        # A tag with a default may be optional. Requiring it makes the alternatives disjoint.
        needed = {"required": [tag]}
        normalizer.resources.add(needed, place)
        return [[*branch, needed] for branch, _ in possible]
    if len(possible) > MAX_COMPARED or not all(
        _are_disjoint(normalizer, a, b, _DEPTH) for i, (_, a) in enumerate(possible) for _, b in possible[:i]
    ):
        raise keywords.SchemaError(place, "oneOf is supported if its alternatives are disjoint, such as by a property "
                                          "with a different const in each; anyOf has no such limit")  # fmt: skip
    return [branch for branch, _ in possible]


def _tag(normalizer: SchemaNormalizer, alternatives: Sequence[Sequence[SchemaPart]]) -> str | None:
    """A property with different values in each alternative, if all are objects."""
    if any(normalizer.types(parts) != {"object"} for parts in alternatives):
        return None
    for name in {name: None for part in alternatives[0] for name in part.get("properties", ())}:
        seen: set[Any] = set()
        for parts in alternatives:
            said = normalizer.parts(
                [part.node["properties"][name] for part in parts if name in part.get("properties", ())]
            )
            values = None if said is None else _values(said)
            if not values or values & seen:
                break
            seen |= values
        else:
            return str(name)
    return None


def _values(parts: Sequence[SchemaPart]) -> set[Any] | None:
    """The values allowed by const and enum; None if there are neither."""
    sets = [{keywords.equality_key(part.get("const"))} for part in parts if part.has("const")]
    sets += [set(map(keywords.equality_key, part.get("enum"))) for part in parts if part.has("enum")]
    return set.intersection(*sets) if sets else None


def _are_disjoint(
    normalizer: SchemaNormalizer, one: Sequence[SchemaPart], other: Sequence[SchemaPart], depth: int
) -> bool:
    """Whether no value matches both, as far as this is easy to tell."""
    normalizer.work(len(one) + len(other))
    types = normalizer.types([*one, *other])
    if not types:
        return True
    a, b = _values(one), _values(other)
    if a is not None and b is not None:
        return not a & b
    known = b if a is None else a
    if known is not None and not any(_is_of(value, types) for value in known):
        return True
    if depth == 0:
        return False
    for this, that in ((one, other), (other, one)):
        for part in this:
            options = part.get("anyOf") or part.get("oneOf")
            if options and all(_is_disjoint_from(normalizer, [option], that, depth - 1) for option in options):
                return True
    if types <= {"integer", "number"}:
        said = [{key: part.node[key] for key in part.node if part.has(key)} for part in (*one, *other)]
        return (
            numbers.numeric([{k: v for k, v in x.items() if k != "multipleOf"} for x in said], types == {"integer"})
            is False
        )
    return types == {"object"} and any(
        _is_disjoint_from(
            normalizer,
            normalizer.property_schemas(one, name),
            normalizer.parts(normalizer.property_schemas(other, name)),
            depth - 1,
        )
        for name in {name for part in (*one, *other) for name in part.get("required", ())}
    )


def _is_of(value: Any, types: set[str]) -> bool:
    """Whether a value, given by its `keywords.equality_key`, has one of the types."""
    name, content = value
    if name == "number":
        return "number" in types or ("integer" in types and content.denominator == 1)
    return _TYPES[name] in types


def _is_disjoint_from(
    normalizer: SchemaNormalizer, schemas: Sequence[Any], parts: Sequence[SchemaPart] | None, depth: int
) -> bool:
    said = normalizer.parts(schemas)
    return said is None or parts is None or _are_disjoint(normalizer, said, parts, depth)
