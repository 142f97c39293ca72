"""Keywords of JSON Schema: the form of their values, subschemas, references, no-ops and unsupported ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin

if TYPE_CHECKING:
    from llguidance import LLMatcher

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
MAX_NAMES = 64
"""Maximum number of property names to enumerate from a pattern."""
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
UNSUPPORTED_FORMATS = (
    *("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
)
"""Formats defined by JSON Schema. Unknown formats are annotations."""


class SchemaError(ValueError):
    """A schema that is not supported, with the place in it."""

    def __init__(self, place: str, message: str):
        super().__init__(f"{message}, at {place}")


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _are_schemas(value: Any) -> bool:
    return isinstance(value, list) and all(_is_schema(one) for one in value)


def _are_named(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_schema(one) for one in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_SCHEMA = (_is_schema, "a schema (an object, true or false)")
_SCHEMAS = (_are_schemas, "a list of schemas")
_NAMED = (_are_named, "an object of schemas")
_NUMBER = (_is_number, "a number")
_COUNT = (_is_count, "a whole number, 0 or more")
_TEXT = (lambda value: isinstance(value, str), "a string")
_LIST = (lambda value: isinstance(value, list) and value, "a list that is not empty")
_BOUND = (lambda value: isinstance(value, bool) or _is_number(value), "a number")

SHAPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), (lambda value: _are_schemas(value) and value, "schemas in a list")),
    "prefixItems": _SCHEMAS,
    "items": (lambda value: _is_schema(value) or _are_schemas(value), "a schema, or a list of schemas"),
    **dict.fromkeys(("additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems"), _SCHEMA),
    **dict.fromkeys(("contains", "propertyNames", "not", "if", "then", "else"), _SCHEMA),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), _NAMED),
    **dict.fromkeys(("minimum", "maximum"), _NUMBER),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _BOUND),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minContains", "maxContains"), _COUNT),
    **dict.fromkeys(("$ref", "pattern", "format"), _TEXT),
    "required": (_are_texts, "a list of strings"),
    "enum": _LIST,
    "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
    "dependentRequired": (lambda value: isinstance(value, dict), "an object of lists"),
    "dependencies": (lambda value: isinstance(value, dict), "an object"),
}
"""Check and description of the value of each keyword."""

KEYWORD_TYPES = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number"),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"), "array"),
    **dict.fromkeys(("properties", "patternProperties", "additionalProperties", "required"), "object"),
    **dict.fromkeys(("minProperties", "maxProperties", "unevaluatedProperties"), "object"),
}
"""Keywords that apply to values of one type only."""
CONSTRAINING = {*KEYWORD_TYPES, "type", "const", "enum", "anyOf", "oneOf"}
"""Keywords that constrain values, apart from ``allOf`` and ``$ref``."""


_NULLABLE = {*SHAPES, "type"}
"""Keywords for which null means absent, as some programs write it. A null const is a value."""


def is_unconstrained(schema: Any) -> bool:
    """Whether a schema obviously allows every value."""
    if isinstance(schema, bool):
        return schema
    return all(name not in SHAPES and name not in CONSTRAINING and name not in _UNSUPPORTED for name in schema)


_NO_EFFECT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "uniqueItems": lambda node: not node["uniqueItems"] or node.get("maxItems", 2) <= 1,
    "maxLength": lambda node: node["maxLength"] >= 2**31,  # beyond what grammars count and outputs reach
    "minItems": lambda node: node["minItems"] == 0,
    "minLength": lambda node: node["minLength"] == 0,
    "minProperties": lambda node: node["minProperties"] == 0,
    "required": lambda node: not node["required"],
    "propertyNames": lambda node: _is_any_text(node["propertyNames"]),
    "unevaluatedItems": lambda node: is_unconstrained(node["unevaluatedItems"]),
    "contains": lambda node: node.get("minContains") == 0 and "maxContains" not in node,
    "minContains": lambda node: "contains" not in node,
    "maxContains": lambda node: "contains" not in node,
    "dependentRequired": lambda node: not any(node["dependentRequired"].values()),
    "dependentSchemas": lambda node: all(map(is_unconstrained, node["dependentSchemas"].values())),
    "dependencies": lambda node: all(one in ([], True, {}) for one in node["dependencies"].values()),
    "not": lambda node: node["not"] is False,
    "if": lambda node: all(is_unconstrained(node.get(name, True)) for name in ("then", "else")),
}
"""Cases in which a keyword has no effect."""
_UNSUPPORTED = (
    *(
        "uniqueItems",
        "propertyNames",
        "contains",
        "minContains",
        "maxContains",
        "dependentRequired",
        "dependentSchemas",
    ),
    *("dependencies", "not", "if", "$dynamicRef", "$recursiveRef"),
)
"""Keywords that are not supported unless they have no effect."""


def _is_any_text(schema: Any) -> bool:
    if isinstance(schema, dict) and schema.get("type") in ("string", ["string"]):
        schema = {name: value for name, value in schema.items() if name != "type"}
    return is_unconstrained(schema)


def children(node: dict[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """The direct subschemas of a schema, with their places."""
    for name, value in node.items():
        shape = SHAPES.get(name)
        if shape is _SCHEMA or (name == "items" and not isinstance(value, list)):
            yield f"{place}/{name}", value
        elif shape is _NAMED:
            for key, one in value.items():
                yield f"{place}/{name}/{key.replace('~', '~0').replace('/', '~1')}", one
        elif name in ("allOf", "anyOf", "oneOf", "prefixItems", "items"):
            for i, one in enumerate(value):
                yield f"{place}/{name}/{i}", one


class Resources:
    """Resolves references within a schema. The values of ``const``, ``enum``, ``default`` and ``examples`` are data.

    Args:
        root: Parsed JSON in which every object occurs once.

    Raises:
        SchemaError: A keyword has an invalid value.
    """

    def __init__(self, root: Any):
        self._homes: dict[int, dict[str, Any]] = {}
        """Maps a schema to the root of its resource."""
        self._bases: dict[int, str] = {}
        """Maps the root of a resource to its base URI."""
        self._places: dict[int, str] = {}
        self._roots: dict[str, dict[str, Any]] = {}
        self._anchors: dict[tuple[int, str], dict[str, Any]] = {}
        self._cleaned: set[int] = set()
        self._patterns: dict[str, LLMatcher] = {}
        self._added: list[dict[str, Any]] = []
        """Keeps schemas alive, because they are identified by ``id()``."""
        self._read(root, None, "#")

    def place(self, node: dict[str, Any]) -> str:
        """The JSON pointer of a schema."""
        return self._places[id(node)]

    def _read(self, root: Any, home: dict[str, Any] | None, place: str) -> None:
        """Register a schema and all of its subschemas."""
        waiting = [(root, home, place)]
        while waiting:
            node, home, place = waiting.pop()
            if not _is_schema(node):
                raise SchemaError(place, f"a schema must be an object, true or false, but this is {node!r:.60}")
            if isinstance(node, bool) or id(node) in self._places:
                continue
            home = self._note(node, home, place)
            waiting += [(child, home, where) for where, child in reversed([*children(node, place)])]

    def _note(self, node: dict[str, Any], home: dict[str, Any] | None, place: str) -> dict[str, Any]:
        """Register the place, ``$id`` and anchors of a schema; returns the root of its resource."""
        self._places[id(node)] = place
        for keyword in [name for name, value in node.items() if value is None and name in _NULLABLE]:
            del node[keyword]
        name = node.get("$id")
        if home is None or (isinstance(name, str) and not name.startswith("#")):
            base = "" if home is None else self._bases[id(home)]
            home = node
            self._bases[id(node)] = urljoin(base, name).partition("#")[0] if isinstance(name, str) else base
            self._roots.setdefault(self._bases[id(node)], node)
        self._homes[id(node)] = home
        if isinstance(name, str) and name.startswith("#"):  # drafts 6 and 7
            self._anchors[id(home), name[1:]] = node
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(node.get(keyword), str):
                self._anchors[id(home), node[keyword]] = node
        for keyword, value in node.items():
            if keyword in SHAPES and not SHAPES[keyword][0](value):
                raise SchemaError(place, f"{keyword} is {value!r:.60}; expected {SHAPES[keyword][1]}")
        return home

    def target(self, node: dict[str, Any]) -> Any:
        """The schema that a ``$ref`` refers to."""
        reference, place = node["$ref"], self.place(node)
        home = self._homes[id(node)]
        address, _, fragment = reference.partition("#")
        if address and (full := urljoin(self._bases[id(home)], address)) != self._bases[id(home)]:
            if full not in self._roots:
                raise SchemaError(place, f"$ref {reference!r:.120} refers to another document, which is not loaded")
            home = self._roots[full]
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            if (id(home), fragment) not in self._anchors:
                raise SchemaError(place, f"$ref {reference!r:.120} refers to a missing $anchor")
            return self._anchors[id(home), fragment]
        found: Any = home
        for step in fragment.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(step) if isinstance(found, list) else step]
            except (LookupError, TypeError, ValueError):
                raise SchemaError(place, f"$ref {reference!r:.120} cannot be resolved") from None
        # It may be under a keyword that is not part of JSON Schema, such as components.
        self._read(found, home, f"{self.place(home)}{fragment}")
        return found

    def clean(self, node: dict[str, Any]) -> None:
        """Remove keywords without effect from a schema, and convert keywords of older drafts.

        Raises:
            SchemaError: An unsupported keyword.
        """
        if id(node) in self._cleaned:
            return
        self._cleaned.add(id(node))
        place = self.place(node)
        for name, nothing in _NO_EFFECT.items():
            if name in node and nothing(node):
                del node[name]
        if isinstance(node.get("if"), bool):
            branch = node.get("then" if node.pop("if") else "else", True)
            node["allOf"] = [*node.get("allOf", ()), branch]
        for name in _UNSUPPORTED:
            if name in node:
                raise SchemaError(place, f"{name} is not supported")
        form = node.get("format")
        if form in UNSUPPORTED_FORMATS:
            raise SchemaError(place, f"format {form!r} is not supported; use a pattern")
        if form is not None and form not in FORMATS:
            del node["format"]
        if isinstance(node.get("items"), list):  # up to draft 2019-09
            node["prefixItems"] = node.pop("items")
            if "additionalItems" in node:
                node["items"] = node["additionalItems"]
        for limit, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if isinstance(node.get(exclusive), bool) and node.pop(exclusive) and limit in node:  # draft 4
                node[exclusive] = node.pop(limit)
        if "unevaluatedItems" in node:
            self._close_items(node, place)
        self._check_types(node, place)

    def _close_items(self, node: dict[str, Any], place: str) -> None:
        if any(name in node for name in ("allOf", "anyOf", "oneOf", "$ref")):
            raise SchemaError(place, "unevaluatedItems is not supported beside allOf, anyOf, oneOf or $ref")
        node.setdefault("items", node.pop("unevaluatedItems"))

    def _check_types(self, node: dict[str, Any], place: str) -> None:
        types = node.get("type", "object")
        for name in types if isinstance(types, list) else [types]:
            if name not in TYPES:
                raise SchemaError(place, f"Invalid type: {name!s:.60}; expected {', '.join(TYPES)}")

    def matches(self, pattern: str, name: str, place: str) -> bool:
        """Whether a pattern of patternProperties matches a name, by the regular expressions of llguidance.

        Raises:
            SchemaError: Not a regular expression, or an unsupported one.
        """
        from llguidance import LLMatcher, LLTokenizer

        if pattern not in self._patterns:
            source = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
            self._patterns[pattern] = LLMatcher(LLTokenizer("byte"), source, log_level=0)
        matcher = self._patterns[pattern].deep_copy()
        if matcher.is_error():
            reason = matcher.get_error().partition("\n<")[0].strip()
            raise SchemaError(place, f"the pattern {pattern!r:.80} of patternProperties cannot be read: {reason}")
        data = list(json.dumps(name, ensure_ascii=False).encode())
        return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())

    def add(self, node: dict[str, Any], place: str) -> None:
        """Register an additional schema at a place."""
        self._places[id(node)] = place
        self._added.append(node)


_CHARACTER = re.compile(
    r"([\w @:,;=&%#~<>'\"!/-])|\\([-.$^*+?()\[\]{}|/\\])|\[((?:\w-\w|\w)+)\]|\(\?:([\w|-]+)\)|\(([\w|-]+)\)", re.ASCII
)


def enumerate_names(pattern: str) -> list[str] | None:
    """The names that a simple pattern such as ``^(a|b)[0-9]$`` matches; None if too many or too complex."""
    if not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    found, place = [""], 1
    while place < len(pattern) - 1:
        step = _CHARACTER.match(pattern, place, len(pattern) - 1)
        if step is None:
            return None
        plain, escaped, characters, *groups = step.groups()
        if characters:
            ranges = re.findall(r"(\w)-(\w)|(\w)", characters)
            options = [chr(code) for a, b, one in ranges for code in range(ord(a or one), ord(b or one) + 1)]
        else:
            options = [plain or escaped] if plain or escaped else (groups[0] or groups[1]).split("|")
        found = [name + option for name in found for option in options]
        if len(found) > MAX_NAMES:
            return None
        place = step.end()
    return list(dict.fromkeys(found))


def equality_key(value: Any) -> Any:
    """A hashable key that is equal for values that are equal in JSON Schema."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value).__name__, value
    if isinstance(value, int | float):
        return "number", Fraction(value)
    if isinstance(value, list):
        return "list", tuple(map(equality_key, value))
    return "object", frozenset((name, equality_key(one)) for name, one in value.items())
