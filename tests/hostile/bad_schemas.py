"""Hostile schemas, patterns and grammars, and request bodies with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]


def chain(length: int) -> Schema:
    """A chain of references."""
    definitions: Schema = {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(length)}
    return {"$ref": "#/$defs/0", "$defs": {**definitions, str(length): {}}}


def doubled(length: int) -> Schema:
    """Definitions that use the next one twice: 2^length copies when expanded."""
    definitions: Schema = {
        str(n): {"type": "object", "properties": {k: {"$ref": f"#/$defs/{n + 1}"} for k in "ab"}} for n in range(length)
    }
    return {"$ref": "#/$defs/0", "$defs": {**definitions, str(length): {"type": "null"}}}


def nested(depth: int, key: str) -> Schema:
    schema: Schema = {"type": "string"}
    for _ in range(depth):
        inner: Any = [schema] if key in ("allOf", "anyOf", "oneOf", "prefixItems") else schema
        schema = {key: {"a": inner} if key == "properties" else inner}
    return schema


def crossed(count: int) -> Schema:
    """Alternatives that must all hold: their product is tried."""
    one = {"anyOf": [{"properties": {f"p{n}": {"const": n}}, "required": [f"p{n}"]} for n in range(count)]}
    return {"type": "object", "allOf": [one] * count}


SCHEMAS: dict[str, Callable[[], Schema]] = {
    "chain-3000": lambda: chain(3000),
    "chain-20000": lambda: chain(20_000),
    "doubled": lambda: doubled(60),
    **{f"nested-{key}": (lambda key=key: nested(300, key)) for key in ("properties", "items", "allOf", "anyOf", "not")},
    "crossed": lambda: crossed(40),
    "loop": lambda: {"$ref": "#"},
    "loops": lambda: {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#"}]}}},
    "enum": lambda: {"enum": [f"value {n}" for n in range(60_000)]},
    "constants": lambda: {"anyOf": [{"const": {"a": [n] * 50}} for n in range(3000)]},
    "properties": lambda: {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(40_000)}},
    "required": lambda: {"type": "object", "required": [f"p{n}" for n in range(60_000)]},
    "length": lambda: {"type": "string", "minLength": 1_000_000_000},
    "lengths": lambda: {"type": "string", "minLength": 99_999, "maxLength": 100_000},
    "items": lambda: {"type": "array", "minItems": 1_000_000_000, "items": {"type": "array", "minItems": 10**9}},
    "counted": lambda: {"type": "array", "minItems": 3000, "maxItems": 3000, "items": {"enum": list(range(99))}},
    "number": lambda: {"type": "number", "multipleOf": 1e-300, "minimum": -1e308, "maximum": 1e308},
    "integer": lambda: {"type": "integer", "minimum": 10**4000, "maximum": 10**4200},
    "pattern-nested": lambda: {"type": "string", "pattern": "^(((a+)+)+)+$"},
    "pattern-counted": lambda: {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "pattern-product": lambda: {"type": "string", "pattern": "(.*a.{200})" * 20},
    "pattern-classes": lambda: {"type": "string", "pattern": r"[\p{L}\p{N}\w\W]{1,500}" * 50},
    "pattern-long": lambda: {"type": "string", "pattern": "(a|b)" * 50_000},
    "pattern-deep": lambda: {"type": "string", "pattern": "(" * 10_000 + "a" + ")" * 10_000},
    "pattern-looks": lambda: {"type": "string", "pattern": "(?=a)" * 1000 + r"(a)\1"},
    "names": lambda: {"type": "object", "patternProperties": {f"^x{n}.*(a|b)+$": {} for n in range(300)}},
    "formats": lambda: {"type": "string", "format": "x" * 1_000_000},
    "description": lambda: {"type": "object", "description": "x" * 5_000_000},
    "remote": lambda: {"$ref": "http://127.0.0.1:9/schema.json"},
    "file": lambda: {"$ref": "file:///etc/passwd"},
    "dynamic": lambda: {"$dynamicRef": "#a", "$dynamicAnchor": "a", "anyOf": [{"$dynamicRef": "#a"}] * 500},
    "conditions": lambda: {"allOf": [{"if": {"required": [f"{n}"]}, "then": {"required": ["x"]}} for n in range(999)]},
    "surrogates": lambda: {"enum": ["\ud800" * 1000]},
    "keys": lambda: {"type": "object", "properties": {"x" * 100_000: {"type": "string"}}, "required": ["x" * 100_000]},
    "unique": lambda: {"type": "array", "uniqueItems": True, "items": {"enum": list(range(200))}},
}  # fmt: skip
"""By name. Each may be rejected or followed, without affecting others."""

ENDLESS = "start: a\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(60)) + "a: a0\na60: /x{1,1000}/\n"
STRUCTURED: dict[str, Any] = {
    "regex": {"regex": "((a{1,999}){1,999}){1,999}"},
    "choice": {"choice": [f"choice {n}" * 20 for n in range(20_000)]},
    "grammar": {"grammar": ENDLESS},
    "grammar-loop": {"grammar": "start: start | start start"},
    "grammar-long": {"grammar": "start: " + " | ".join(f'"{n}"' for n in range(60_000))},
    "grammar-deep": {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
    "grammar-terminals": {"grammar": 'start: A\nA: B B\nB: A | "b"\n'},
}
"""Values of vLLM's ``structured_outputs``."""


def bodies() -> dict[str, bytes]:
    """Chat request bodies by name: every schema as the response format, some also as parameters of a function."""
    found = {}
    for name, make in SCHEMAS.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": make()}}
        found[f"format/{name}"] = chat(response_format=form)
    for name in ("chain-3000", "chain-20000", "doubled", "nested-properties", "crossed", "pattern-counted", "enum"):
        function = {"type": "function", "function": {"name": "f", "parameters": SCHEMAS[name]()}}
        found[f"tools/{name}"] = chat(tools=[function], tool_choice="required")
    # Deeper than Python's own writer goes.
    deep = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": "deep"}})
    for depth in (2000, 50_000):
        found[f"format/deep-{depth}"] = deep.replace(b'"deep"', b'{"items":' * depth + b"{}" + b"}" * depth)
    for name, value in STRUCTURED.items():
        found[f"structured/{name}"] = chat(structured_outputs=value)
    return found


def chat(**fields: Any) -> bytes:
    """A chat request body with further fields."""
    said = [{"role": "user", "content": "hello"}]
    return json.dumps({"messages": said, "max_tokens": 4, "temperature": 0, **fields}).encode()
