"""Tool calls in model output: the same calls and text however the output is split into pieces, nothing lost, and
arguments verbatim."""

from __future__ import annotations

import json
from collections.abc import Iterator

from aria.processor import calls
from aria.serve.tool_calls import Call, CallReader, UntaggedCallReader
from tests.fuzz.draw import Draw

LONGEST = 1024
WORDS = (
    *("<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {"x": "y"}}', '"f"'),
    *(
        '"name"',
        '"arguments"',
        ": ",
        ", ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        "\\u00e9",
        "\\ud800",
        "NaN",
        "1e999",
        " ",
        "\n",
    ),
    *("<tool", "</tool_call", '"</tool_call>"', "null", '{"name": "g"}', "text"),
)
NAMES = ("f",)


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    text = draw.text(WORDS, 16) if draw.flag() else draw.bytes(400).decode("utf-8", "replace")
    whole = _read(CallReader(NAMES), [text])
    assert _read(CallReader(NAMES), list(text)) == whole, "other calls in single characters"
    cut = sorted(draw.below(len(text) + 1) for _ in range(4))
    pieces = [text[start:end] for start, end in zip([0, *cut], [*cut, len(text)], strict=True)]
    assert _read(CallReader(NAMES), pieces) == whole, "other calls in other pieces"
    _check_kept(text, whole)
    _read(UntaggedCallReader(NAMES), pieces)
    _check_written(draw)


def _read(reader: CallReader | UntaggedCallReader, pieces: list[str]) -> list[str | tuple[str, str]]:
    """Texts, those that follow each other joined, and calls."""
    found: list[str | tuple[str, str]] = []
    for part in [*(part for piece in pieces for part in reader.push(piece)), *reader.flush()]:
        if isinstance(part, Call):
            json.loads(part.arguments)
            found.append((part.name, part.arguments))
        elif found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


def _check_kept(text: str, found: list[str | tuple[str, str]]) -> None:
    """All texts and calls stand in the text in their order, and what is between them belongs to calls."""
    at = 0
    for part in found:
        piece = part if isinstance(part, str) else part[1]
        place = text.find(piece, at)
        if not (isinstance(part, tuple) and piece == "{}"):  # of a call without arguments
            assert place >= 0, f"{piece!r} is not in the text"
            at = place + len(piece)
    if not any(isinstance(part, tuple) for part in found):
        assert "".join(part for part in found if isinstance(part, str)) == text, "text was lost"


def _check_written(draw: Draw) -> None:
    """What is written for training is read back as what was called."""
    name, arguments = draw.text(WORDS, 3), draw.text(WORDS, 6)
    try:
        text = calls.format_call(name, arguments)
        inner = text.removeprefix(calls.OPEN).removesuffix(calls.CLOSE)
    except (ValueError, UnicodeError):
        return
    if isinstance(json.loads(arguments or "{}"), dict):
        read_name, read_arguments = calls.parse_call(inner)
        assert (read_name, json.loads(read_arguments)) == (name, json.loads(arguments or "{}"))


def seeds() -> Iterator[bytes]:
    for text in (
        'a <tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call> b',
        '<tool_call>{"name": "g"}</tool_call><tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1',
        "text <tool_call> text",
    ):
        yield b"\0" + text.encode()
    yield bytes(range(1, 120, 2)) * 2
