"""Convert normalized schemas with patterns of numbers to llguidance's Lark, since JSON schemas cannot express these.

Only the parts that contain such a number become rules; the rest stays embedded JSON schemas. The terminals are those
that llguidance makes for JSON schemas, because its lexer takes the longest match.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aria.grammars.shape import children

MAX_CHARACTERS = 4_000_000
"""Maximum size of such a grammar: shared definitions are repeated in each embedded JSON schema."""
_TEXT = r'/"([^"\\\x00-\x1F\x7F]|\\["\\bfnrt])*"/'


def lark(schema: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Return a Lark grammar for a schema, or None if it has no patterns of numbers.

    Args:
        schema: A schema from :func:`aria.grammars.schemas.normalize`.
        settings: The ``x-guidance`` settings for embedded JSON schemas.

    Raises:
        ValueError: A pattern of numbers in an unsupported place.
    """
    writer = _SchemaWriter(schema.get("$defs", {}), settings)
    root = {key: value for key, value in schema.items() if key != "$defs"}
    return writer.grammar(root) if writer.is_exact(root) else None


class _SchemaWriter:
    def __init__(self, definitions: Mapping[str, Any], settings: Mapping[str, Any]):
        self._definitions = definitions
        self._settings = dict(settings)
        self._rules: list[str] = []
        self._size = 0
        self._exact = {name for name, definition in definitions.items() if _has_numbers(definition)}
        """Definitions that contain patterns of numbers, directly or by reference."""
        leading: dict[str, list[str]] = {}
        for name, definition in definitions.items() if self._exact else ():
            for other in _references(definition):
                leading.setdefault(other, []).append(name)
        waiting = [*self._exact]
        while waiting:
            more = set(leading.get(waiting.pop(), ())) - self._exact
            self._exact |= more
            waiting += more

    def grammar(self, root: Any) -> str:
        start = self.value(root)
        for name in sorted(self._exact):
            self._rules.append(f"{name}: {self.value(self._definitions[name])}")
        return "\n".join([f"start: {start}", *self._rules])

    def is_exact(self, schema: Any) -> bool:
        """Whether a schema contains patterns of numbers, directly or by reference."""
        return _has_numbers(schema) or any(name in self._exact for name in _references(schema))

    def _reachable(self, schema: Any) -> set[str]:
        found: set[str] = set()
        waiting = [schema]
        while waiting:
            for name in _references(waiting.pop()):
                if name not in found:
                    found.add(name)
                    waiting.append(self._definitions[name])
        return found

    def _rule(self, body: str) -> str:
        self._size += len(body)
        if self._size > MAX_CHARACTERS:
            raise ValueError("it is too large for a schema with numbers beyond 2^53")
        self._rules.append(f"r{len(self._rules)}: {body}")
        return f"r{len(self._rules) - 1}"

    def value(self, schema: Any) -> str:
        """A Lark expression for the values of a schema."""
        if not self.is_exact(schema):
            return self._rule(f"%json {self._json(schema)}")
        if "x-number" in schema:
            return f"/{schema['x-number']}/"
        if "$ref" in schema:
            return str(schema["$ref"].rpartition("/")[2])
        if "anyOf" in schema:
            plain = [option for option in schema["anyOf"] if not self.is_exact(option)]
            options = [self.value(option) for option in schema["anyOf"] if self.is_exact(option)]
            options += [self.value({"anyOf": plain})] if plain else []
            return self._rule(" | ".join(options))
        if "allOf" in schema:
            raise ValueError("numbers beyond 2^53 are not supported beside const or enum of objects or arrays")
        return self._array(schema) if schema["type"] == "array" else self._object(schema)

    def _json(self, schema: Any) -> str:
        definitions = {name: self._definitions[name] for name in sorted(self._reachable(schema))}
        own = {"anyOf": [schema]} if isinstance(schema, bool) else schema
        return json.dumps({**own, "$defs": definitions, "x-guidance": self._settings})

    def _array(self, schema: Mapping[str, Any]) -> str:
        prefix, items = schema.get("prefixItems", []), schema["items"]
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most is not None and most <= len(prefix):
            prefix, items = prefix[:most], False
        first = [(self.value(one), i < least) for i, one in enumerate(prefix)]
        if items is False:
            rest = None
        else:
            rest = self.value(items), max(least - len(prefix), 0), None if most is None else most - len(prefix)
        return self._rule(f'"[" {self._comma_separated_prefix(first, rest)} "]"')

    def _object(self, schema: Mapping[str, Any]) -> str:
        if "patternProperties" in schema:
            raise ValueError("numbers beyond 2^53 are not supported in an object with patternProperties")
        properties, required = schema["properties"], schema["required"]
        others = schema["additionalProperties"]
        names = [*properties, *(name for name in required if name not in properties)]
        quoted = {name: json.dumps(json.dumps(name, ensure_ascii=False), ensure_ascii=False) for name in names}
        members = [
            (f'{quoted[name]} ":" {self.value(properties.get(name, others))}', name in required)
            for name in names
            if properties.get(name, others) is not False
        ]
        if others is False:
            return self._rule(f'"{{" {self._comma_separated(members, None)} "}}"')
        key = f"K{len(self._rules)}"
        taken = f" & ~({' | '.join(quoted.values())})" if quoted else ""
        self._rules.append(f"{key}: {_TEXT}{taken}")
        most = schema.get("maxProperties")
        rest = (f'{key} ":" {self.value(others)}', max(schema.get("minProperties", 0) - len(members), 0),
                None if most is None else most - len(members))  # fmt: skip
        return self._rule(f'"{{" {self._comma_separated(members, rest)} "}}"')

    def _comma_separated_prefix(
        self, items: Sequence[tuple[str, bool]], rest: tuple[str, int, int | None] | None
    ) -> str:
        """Comma-separated items, where an item may only be missing if all later ones are, then repeated others."""
        tail = ""
        if rest is not None and rest[2] != 0:
            tail = _repeated(f'"," {rest[0]}', rest[1], rest[2]) if items else _several(rest)
        for i in range(len(items) - 1, -1, -1):
            item, required = items[i]
            tail = self._rule(f"{chr(34) + ',' + chr(34) + ' ' if i else ''}{item} {tail}")
            tail = tail if required else f"{tail}?"
        return tail

    def _comma_separated(self, members: Sequence[tuple[str, bool]], rest: tuple[str, int, int | None] | None) -> str:
        """Comma-separated members, where any optional one may be missing, then repeated others."""
        later = first = ""
        if rest is not None and rest[2] != 0:
            later, first = _repeated(f'"," {rest[0]}', rest[1], rest[2]), _several(rest)
        for member, required in reversed(members):
            if required:
                first = self._rule(f"{member} {later}")
                later = self._rule(f'"," {member} {later}')
            else:
                with_it = self._rule(f"{member} {later}")
                first = self._rule(f"{with_it} | {first}") if first else f"{with_it}?"
                later = self._rule(f'("," {member})? {later}')
        return first


def _several(rest: tuple[str, int, int | None]) -> str:
    item, least, most = rest
    more = _repeated(f'"," {item}', max(least - 1, 0), None if most is None else most - 1)
    return f"({item} {more})" + ("" if least else "?")


def _repeated(item: str, least: int, most: int | None) -> str:
    if most == 0:
        return ""
    return f"({item}){{{least},{'' if most is None else most}}}"


def _has_numbers(schema: Any) -> bool:
    return isinstance(schema, dict) and ("x-number" in schema or any(map(_has_numbers, children(schema))))


def _references(schema: Any) -> Iterator[str]:
    """Names of the definitions that a schema references."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for child in children(schema):
            yield from _references(child)
