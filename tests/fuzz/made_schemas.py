"""JSON schemas out of keywords that are followed, so that most of them become grammars."""

from __future__ import annotations

from typing import Any

from tests.fuzz.draw import Draw

NAMES = ("a", "b", "x y", 'q"', "größe", "kind")
PATTERNS = ("^a{1,3}$", "[0-9]+", "^(ab|c){0,2}$", "x", "^$", r"\d\w\s", "[^a]", "(?=a)", "^[a-c]{3}", "💥?")
FORMATS = ("date", "time", "uuid", "ipv4", "email", "duration", "iri", "strange")
BOUNDS = (0, 1, -1, 3, 10, 0.5, 2**53, 2**53 + 1, -(2**53) - 5, 10**20, 10**41, 1e300, 2.5)
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
KEYWORDS = (
    *("type", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "$defs", "properties", "required"),
    *("additionalProperties", "patternProperties", "minProperties", "items", "prefixItems", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format", "minimum", "exclusiveMaximum", "multipleOf", "not", "if", "$id"),
)


def schema(draw: Draw, depth: int = 3) -> Any:
    """A schema, with references to its own ``$defs`` and to itself."""
    return {**_schema(draw, depth), "$defs": {name: _schema(draw, 2) for name in ("a", "b")}}


def _schema(draw: Draw, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(1 + draw.below(3)):
        found |= _said(draw, depth)
    return found


def _said(draw: Draw, depth: int) -> dict[str, Any]:
    """One thing that is said of a value."""
    match draw.below(14 if depth else 9):
        case 0:
            return {"type": draw.one(TYPES)}
        case 1:
            return {"type": [draw.one(TYPES), draw.one(TYPES)]}
        case 2:
            return {"enum": [_value(draw) for _ in range(1 + draw.below(3))]}
        case 3:
            return {"const": _value(draw)}
        case 4:
            return {draw.one(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")): draw.one(BOUNDS)}
        case 5:
            return {"type": draw.one(("integer", "number")), "multipleOf": abs(draw.one(BOUNDS)) or 1}
        case 6:
            return {draw.one(("minLength", "maxLength", "minItems", "maxItems", "minProperties")): draw.below(4)}
        case 7:
            return {"pattern": draw.one(PATTERNS)} if draw.flag() else {"format": draw.one(FORMATS)}
        case 8:
            return {"$ref": draw.one(("#/$defs/a", "#/$defs/b", "#", "#/$defs/none"))}
        case 9:
            return {draw.one(("anyOf", "allOf", "oneOf")): [_schema(draw, depth - 1) for _ in range(1 + draw.below(3))]}
        case 10:
            named = {draw.one(NAMES): _schema(draw, depth - 1) for _ in range(1 + draw.below(3))}
            return {"properties": named, "required": [name for name in named if draw.flag()]}
        case 11:
            said = draw.flag() if draw.flag() else _schema(draw, depth - 1)
            return {draw.one(("additionalProperties", "unevaluatedProperties", "items")): said}
        case 12:
            return {"patternProperties": {draw.one(PATTERNS): _schema(draw, depth - 1)}}
    return {"prefixItems": [_schema(draw, depth - 1) for _ in range(1 + draw.below(2))], "items": draw.flag()}


def _value(draw: Draw) -> Any:
    return draw.one((None, True, "yes", "é\n", 0, 1, 1.5, 2**53 + 1, [1, "a"], {"a": 1}, {"kind": "b"}, "", -3))
