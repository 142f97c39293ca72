"""The text format of tool calls, for training and generation.

Aria has no format of its own. This one is common among open models:
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_WHITE = re.compile(r"[ \t\n\r]*")
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """The text that describes the available functions to the model.

    Args:
        tools: Mappings with ``name``, and optionally ``description`` and ``parameters`` (JSON Schema).
    """
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You may call functions. These are known, one a line:\n{listed}\n"
        f'To call one, write {OPEN}{{"name": "the function", "arguments": {{...}}}}{CLOSE} and end your answer; '
        "several calls may follow each other. Results come in messages of the role tool."
    )


def add_instructions(messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Append :func:`instructions` to the system message, adding one if there is none.

    Args:
        messages: At least one message, as for :func:`aria.processor.chat.render`. Media in the system message are kept.
        tools: As for :func:`instructions`.
    """
    text = instructions(tools)
    first, *rest = messages
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    content = text_or_parts(first["content"])
    if isinstance(content, str):
        return [{"role": "system", "content": f"{content}\n\n{text}" if content else text}, *rest]
    return [{"role": "system", "content": [*content, {"type": "text", "text": f"\n\n{text}"}]}, *rest]


def text_or_parts(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of a message as one string if it is only text; otherwise the list of parts."""
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return content
    return "".join(part["text"] for part in content)


def format_call(name: str, arguments: str) -> str:
    """Format a call for the conversation.

    Raises:
        ValueError: The arguments are not strict JSON (no NaN, Infinity or lone surrogates).
    """
    try:
        parsed = json.loads(arguments or "{}", parse_constant=_refuse)
        text = json.dumps({"name": name, "arguments": parsed}, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):
        raise ValueError(f"the arguments of {name!r} should be JSON in a string, but are {arguments!r:.80}") from None
    return f"{OPEN}{text}{CLOSE}"


def format_past_call(name: str, arguments: str) -> str:
    """Format a past call of the model, whose arguments may be truncated or invalid.

    Invalid arguments are kept verbatim: the model sees what it wrote, next to the error reported by the client.
    """
    try:
        return format_call(name, arguments)
    except ValueError:
        return f'{OPEN}{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}{CLOSE}'


def parse_call(text: str) -> tuple[str, str]:
    """Parse a call: the function name, and the arguments verbatim.

    Raises:
        ValueError: Not a call, or not strict JSON (no NaN, Infinity or lone surrogates).
    """
    said = _DECODER.decode(text)
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        raise ValueError("a call must be an object with a name")
    if not isinstance(said.get("arguments", {}), dict):
        raise ValueError("the arguments of a call must be an object")
    json.dumps(said, ensure_ascii=False).encode()
    arguments = "{}"
    place = _skip(text, text.index("{") + 1)
    while text[place] != "}":
        key, place = _DECODER.raw_decode(text, place)
        start = _skip(text, _skip(text, place) + 1)
        _, end = _DECODER.raw_decode(text, start)
        if key == "arguments":
            arguments = text[start:end]
        place = _skip(text, end)
        if text[place] == ",":
            place = _skip(text, place + 1)
    return said["name"], arguments


def end_of_call(text: str, start: int, seen: int = 0) -> int:
    """Find the closing tag of a call whose JSON begins at ``start``; -1 if there is none. Tags in strings are text.

    Args:
        text: Output of the model.
        start: Offset after :data:`OPEN`.
        seen: Offset before which there is no closing tag.
    """
    place = text.find(CLOSE, max(start, seen))
    while place >= 0 and '"' in _STRINGS.sub("", text[start:place]):
        place = text.find(CLOSE, place + 1)
    return place


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _skip(text: str, place: int) -> int:
    """The offset of the next character that is not white space."""
    found = _WHITE.match(text, place)
    assert found is not None, "the pattern also matches the empty string"
    return found.end()


_DECODER = json.JSONDecoder(parse_constant=_refuse)
