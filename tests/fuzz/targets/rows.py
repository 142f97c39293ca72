"""Rows of training files: rejected with a kind of fault, or a conversation that can be rendered."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from aria.processor.chat import render
from aria.train.data.report import RowError
from aria.train.data.rows import Conversation, MediaDefaults, Text, read_row
from aria.train.data.sources import JsonlFile
from tests.fuzz.draw import Draw, spoiled
from tests.fuzz.files import folder

LONGEST = 600
DEFAULTS = MediaDefaults(num_frames=2, timestamps=True, sizes=(224, 448))
WORDS = (
    *(
        "messages",
        "role",
        "content",
        "user",
        "assistant",
        "system",
        "tool",
        "type",
        "text",
        "image",
        "video",
        "document",
    ),
    *("images", "tools", "tool_calls", "function", "name", "arguments", "weight", "image_url", "url", "path", "pages"),
    *("<image>", "from", "value", "num_frames", "fps", "detail", "auto", "input_image", "file", "file_data", "split"),
)
_ROWS = (
    {"text": "hello"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}, {"type": "video"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ],
        "images": ["a.png"],
        "video": {"path": "b.mp4", "num_frames": 3},
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "name": "f", "content": "r"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [{"function": {"name": "f", "parameters": {}}}],
    },
)


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    lines = [
        json.dumps(spoiled(draw, json.loads(json.dumps(draw.one(_ROWS))), WORDS)) for _ in range(1 + draw.below(2))
    ]
    content = "\n".join(lines).encode()
    if draw.byte() % 4 == 3:
        at = draw.below(len(content) + 1)
        content = content[:at] + draw.rest() + content[at + draw.below(3) :]
    file = folder("rows") / "train.jsonl"
    file.write_bytes(content)
    try:
        rows = JsonlFile(file)
    except ValueError as error:
        assert str(file) in str(error)
        return
    for index in range(len(rows)):
        try:
            read, unread = read_row(rows.read(index), DEFAULTS)
        except RowError as error:
            assert error.kind and len(error.kind) < 40
            assert len(str(error)) < 2000, "a message as long as the row"
            continue
        assert all(isinstance(name, str) for name in unread)
        if isinstance(read, Text):
            assert read.text.strip()
            continue
        assert isinstance(read, Conversation)
        assert len(read.trained_on) == len(read.messages) and any(read.trained_on)
        try:
            render(read.messages)
        except ValueError as error:
            assert len(str(error)) < 2000, "a message as long as the row"


def seeds() -> Iterator[bytes]:
    chance = random.Random(0)
    yield from (chance.randbytes(30) for _ in range(40))
