"""Calls of functions in what the model writes, read back; :mod:`aria.processor.calls` has their format."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aria.processor.calls import CLOSE, OPEN


@dataclass(frozen=True)
class Call:
    """A function and what it is called with."""

    id: str
    name: str
    arguments: str
    """JSON."""


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON Schema of one call of any of the functions."""
    return any_of(
        [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    "arguments": _moved(tool.get("parameters") or {"type": "object"}, "#/properties/arguments"),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    )


def any_of(schemas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of what follows one of these."""
    if len(schemas) == 1:
        return dict(schemas[0])
    return {"anyOf": [_moved(schema, f"#/anyOf/{i}") for i, schema in enumerate(schemas)]}


def _moved(schema: Any, place: str) -> Any:
    """A schema as it reads inside another one: what it refers to within itself lies deeper there."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }


def parse(text: str, names: Collection[str]) -> Call | None:
    """The call that a text is, or None: not JSON, not a call, or of a function that is not offered."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or said.get("name") not in names or not isinstance(said.get("arguments", {}), dict):
        return None
    arguments = json.dumps(said.get("arguments", {}), ensure_ascii=False)
    return Call(f"call_{uuid.uuid4().hex[:24]}", said["name"], arguments)


class CallReader:
    """Finds calls in text that comes in pieces; what may yet become a tag is held back.

    Args:
        names: functions that are offered; calls of others stay text, as does what is no call between the tags.
    """

    def __init__(self, names: Collection[str]):
        self._names = names
        self._held = ""

    def push(self, piece: str) -> list[str | Call]:
        """The next piece of text; what became certain with it, in order."""
        self._held += piece
        found: list[str | Call] = []
        while (start := self._held.find(OPEN)) >= 0:
            end = self._held.find(CLOSE, start)
            if end < 0:
                break
            call = parse(self._held[start + len(OPEN) : end], self._names)
            end += len(CLOSE)
            if call is None:
                found.append(self._held[:end])
            else:
                found += [self._held[:start].rstrip(), call]
                end += len(self._held[end:]) - len(self._held[end:].lstrip())
            self._held = self._held[end:]
        # White space before a call belongs to neither, and is held back with the tag.
        keep = len(self._held[:start].rstrip()) if start >= 0 else len(self._held) - self._open_end()
        found.append(self._held[:keep])
        self._held = self._held[keep:]
        return [one for one in found if one]

    def flush(self) -> list[str | Call]:
        """No more text comes: what was held back. A call may lack its last tag, where the answer stopped at it."""
        held, self._held = self._held, ""
        before, tag, inside = held.partition(OPEN)
        call = parse(inside, self._names) if tag else None
        found: list[str | Call] = [held] if call is None else [before.rstrip(), call]
        return [one for one in found if one]

    def _open_end(self) -> int:
        """Length of the longest end that begins a tag, and of the white space before it."""
        longest = min(len(self._held), len(OPEN) - 1)
        tag = next((n for n in range(longest, 0, -1) if OPEN.startswith(self._held[-n:])), 0)
        before = self._held[: len(self._held) - tag]
        return tag + len(before) - len(before.rstrip())


class WholeCall:
    """The same for an answer that a grammar makes one call without tags, or else text."""

    def __init__(self, names: Collection[str]):
        self._names = names
        self._text = ""

    def push(self, piece: str) -> list[str | Call]:
        """Nothing before the call is whole."""
        self._text += piece
        call = parse(self._text, self._names) if self._text.endswith("}") else None
        if call is None:
            return []
        self._text = ""
        return [call]

    def flush(self) -> list[str | Call]:
        """What was no call, or is left of one that was cut short."""
        held, self._text = self._text, ""
        return [held] if held else []
