"""Parsing of tool calls in generated text; :mod:`aria.processor.calls` defines their format."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aria.processor import calls
from aria.processor.calls import CLOSE, OPEN

_NAMING = {
    *("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames", "required"),
    *("minProperties", "$ref", "allOf", "anyOf", "oneOf", "const", "enum"),
}
"""Keywords that constrain an object's properties."""


@dataclass(frozen=True)
class Call:
    """A call of a function."""

    id: str
    name: str
    arguments: str
    """JSON."""


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON schema of one call of any of the functions."""
    return any_of(
        [
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "arguments": parameters(tool)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    )


def parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of a function's arguments, an object; a function without parameters takes none.

    Raises:
        ValueError: Its parameters do not allow an object.
    """
    given = tool.get("parameters") or {}
    types = given.get("type") or "object"
    if "object" not in (types if isinstance(types, list) else [types]):
        raise ValueError(
            f"the parameters of {tool['name']!r} are of the type {types!r:.60}; expected object, as arguments have "
            "names"
        )
    # An id of its own, so that its references resolve within it wherever it is embedded.
    own = given.get("$id")
    address = own if isinstance(own, str) and not own.startswith("#") else f"urn:parameters:{tool['name']}"
    schema = {**given, "$id": address, "type": "object"}
    return schema if any(schema.get(name) is not None for name in _NAMING) else {**schema, "properties": {}}


def any_of(schemas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A schema that allows what any of these allows."""
    if len(schemas) == 1:
        return dict(schemas[0])
    return {"anyOf": [{"$id": f"urn:choice:{i}", **schema} for i, schema in enumerate(schemas)]}


def parse(text: str, names: Collection[str]) -> Call | None:
    """Parse a call; None if the text is not JSON, not a call, or names a function that is not offered."""
    try:
        name, arguments = calls.parse_call(text)
    except (ValueError, RecursionError):
        return None
    return Call(f"call_{uuid.uuid4().hex[:24]}", name, arguments) if name in names else None


class CallReader:
    """Finds calls in text that arrives in pieces; what may become a tag is held back.

    Args:
        names: Offered functions; calls of others and invalid calls remain text.
    """

    def __init__(self, names: Collection[str]):
        self._names = names
        self._held = ""
        self._seen = 0
        """No closing tag of the held call begins before this position."""
        self._behind_call = False
        """Only whitespace followed the last call; whitespace around calls is dropped."""

    def push(self, piece: str) -> list[str | Call]:
        """Add a piece of text; returns what became final, in order."""
        self._held += piece
        if self._behind_call:
            self._held = self._held.lstrip()
            self._behind_call = not self._held
        return self._read(last=False)

    def flush(self) -> list[str | Call]:
        """End of the text: returns what was held back. A call may lack its closing tag, if generation stopped there."""
        found = self._read(last=True)
        held, self._held = self._held, ""
        before, tag, inside = held.partition(OPEN)
        call = parse(inside, self._names) if tag else None
        found += [held] if call is None else [before.rstrip(), call]
        return [one for one in found if one]

    def _read(self, last: bool) -> list[str | Call]:
        found: list[str | Call] = []
        while (start := self._held.find(OPEN)) >= 0:
            inside = start + len(OPEN)
            end = calls.end_of_call(self._held, inside, self._seen)
            if end < 0 and last:
                end = self._held.find(CLOSE, inside)  # the quotes do not match, so this is not a call
            if end < 0:
                break
            call = parse(self._held[inside:end], self._names)
            end += len(CLOSE)
            if call is None:
                found.append(self._held[:end])
            else:
                found += [self._held[:start].rstrip(), call]
                end += len(self._held[end:]) - len(self._held[end:].lstrip())
            self._held, self._seen = self._held[end:], 0
            self._behind_call = call is not None and not self._held
        # Whitespace before a call is dropped, so it is held back with the tag.
        keep = len(self._held[:start].rstrip()) if start >= 0 else len(self._held) - self._open_end()
        found.append(self._held[:keep])
        self._held = self._held[keep:]
        self._seen = max(len(self._held) - len(CLOSE) + 1, 0)
        return [one for one in found if one]

    def _open_end(self) -> int:
        """Length of the longest suffix that may begin a tag, and of the whitespace before it."""
        longest = min(len(self._held), len(OPEN) - 1)
        tag = next((n for n in range(longest, 0, -1) if OPEN.startswith(self._held[-n:])), 0)
        before = self._held[: len(self._held) - tag]
        return tag + len(before) - len(before.rstrip())


class UntaggedCallReader:
    """The same for responses that a grammar forces to be one call without tags, or text."""

    def __init__(self, names: Collection[str]):
        self._names = names
        self._text = ""

    def push(self, piece: str) -> list[str | Call]:
        """Add a piece of text; returns the call once it is complete."""
        self._text += piece
        call = parse(self._text, self._names) if self._text.endswith("}") else None
        if call is None:
            return []
        self._text = ""
        return [call]

    def flush(self) -> list[str | Call]:
        """End of the text: returns text that was no call, or an incomplete call."""
        held, self._text = self._text, ""
        return [held] if held else []
