"""Incremental JSON parsing, split anywhere: the same result as Python's parser, or an error in the same cases."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from aria.serve.errors import ApiError
from aria.serve.json_reader import JsonReader
from tests.fuzz.draw import Draw

MEMORY = 64 << 20
WORDS = (
    *(
        '{"a": ',
        '"messages"',
        "[",
        "]",
        "{",
        "}",
        ", ",
        ": ",
        "null",
        "NaN",
        "1e5",
        "-0",
        "\\u00e9",
        "\\ud83d\\udca5",
        "\\ud800",
    ),
    *("\x10", "\x11", "\x12", "\x13", '"\x10"', "\ufeff", "é", "💥", "\\", '\\"', "\\u", "\n"),
)
_LONG = {0x10: b"x" * 300, 0x11: b"\\n" * 130, 0x12: b"\\ud83d\\udca5" * 30, 0x13: "é".encode() * 200}
"""Control characters that no JSON has stand for what makes strings long."""
_SAID = re.compile(r"the body is not JSON: (.*) at character (\d+)")


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    step = 1 + draw.below(1 << 9)
    content = b"".join(_LONG.get(byte, bytes([byte])) for byte in draw.rest())
    expected, fault = _at_once(content)
    try:
        found = _in_pieces(content, step)
    except ApiError as error:
        _check_error(error, fault, content)
        return
    assert fault is None, f"Python refuses it: {fault!r}"
    assert repr(found) == repr(expected)


def _at_once(content: bytes) -> tuple[Any, Exception | None]:
    try:
        return json.loads(content), None
    except (ValueError, RecursionError) as error:
        return None, error


def _in_pieces(content: bytes, step: int) -> Any:
    reader = JsonReader()
    for start in range(0, len(content), step):
        reader.feed(content[start : start + step])
    assert reader.received == len(content)
    return reader.parse()


def _check_error(error: ApiError, fault: Exception | None, content: bytes) -> None:
    assert error.status in (400, 413)
    assert len(error.message) < 500, "a message as long as the body"
    said = _SAID.fullmatch(error.message)
    if fault is None:
        allowed = (
            error.status == 413 or "nested too deeply" in error.message or (said and said[1].startswith("Name of"))
        )
        assert allowed, f"Python reads it: {error}"
    elif said and isinstance(fault, json.JSONDecodeError) and said[1] == fault.msg:
        # Faults of long strings are found before others.
        assert fault.pos <= int(said[2]) <= len(content), f"{error}, but Python says {fault}"


def seeds() -> Iterator[bytes]:
    for text in (
        b'{"a": [1, 2.5, null, "b"], "c": {"d": "\\u00e9\\ud83d\\udca5"}}',
        b'{"a": "\x10", "b": "\x10\x11\\u00e9", "c": ["\x12\x13"]}',
        b'["\x10\x10', b'{"\x10": 1}', b'"\x11"', b"[" * 90, b"",
        json.dumps(["é", "x"]).encode("utf-16"),
    ):  # fmt: skip
        yield b"\0\7" + text
        yield b"\1\xff" + text
