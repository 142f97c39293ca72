"""Messages of a compromised worker to its parent: images of the declared shape, or a ValueError,
and all reserved memory is released."""

from __future__ import annotations

import gc
import json
import random
import socket
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any
from unittest import mock

import numpy as np

from aria.media import read
from aria.media.budgets import MemoryBudget, PixelBudget
from aria.media.limits import MediaSettings
from aria.media.open import OpenedMedia
from aria.workers import Workers
from aria.workers.channel import _LENGTH, Channel
from aria.workers.process import MAX_ANSWER, Worker, WorkerError
from tests.fuzz.draw import Draw, spoiled

LONGEST = 600
MEMORY = 64 << 20
SETTINGS = MediaSettings(workers=1, decoded_bytes=1 << 20, image_timeout=0.3, decode_timeout=0.3, clip_decoder="cpu")
WORDS = (
    "call",
    "arguments",
    "result",
    "error",
    "memory",
    "failure",
    "take",
    "sizes",
    "fit",
    "array",
    "progress",
    "size",
    "frames",
    "read",
)
_CALLS: list[dict[str, Any]] = [
    {"call": "take", "arguments": [12, 192]},
    {"call": "take", "arguments": [12, 192, 4, 3]},
    {"call": "sizes", "arguments": [4, 3]},
    {"call": "fit", "arguments": [4, 3]},
    {"call": "progress", "arguments": ["image", 1, 2]},
    {"call": "array", "arguments": [3, 4, 3]},
]
_RESULTS: dict[str, dict[str, Any]] = {
    "image": {"size": [4, 3]},
    "clip": {"frames": [[0, 0, 1, 4, 3, 1], [1, 1, 25, 4, 3, 1]]},
    "document": {"pages": 2, "read": [[1, 4, 3, 1]]},
}
_PLAN = [[4, 3], 0, [1, 25], False, None, [[0, 0], [1, 1]], [[0, [[0, [0, 0, None]]], [0, 1]]]]
_READERS: dict[str, Callable[[OpenedMedia], Any]] = {
    "image": lambda medium: read.read_image(medium, SETTINGS, PixelBudget(1 << 20).spend),
    "clip": lambda medium: read.read_clip(medium, num_frames=2, settings=SETTINGS),
    "document": lambda medium: read.read_document(medium, settings=SETTINGS),
}


class _Worker(Worker):
    """One that is only a connection."""

    def __init__(self, channel: Channel):
        self._channel, self.jobs, self.slow, self.missing = channel, 0, False, []

    def kill(self) -> None:
        self._channel.close()

    def cpu_seconds(self) -> float:
        return 0.0

    def resident_bytes(self) -> int:
        return 0

    pause = resume = lower_priority = lambda self: None


class _Workers(Workers):
    """Workers that have said already all that they will say."""

    def __init__(self, said: bytes):
        super().__init__(1, 1 << 20)
        self._said = said

    def _take(self) -> Worker:
        ours, self._theirs = socket.socketpair()
        self._theirs.sendall(self._said)
        self._theirs.shutdown(socket.SHUT_WR)
        return _Worker(Channel(ours, MAX_ANSWER))

    def _give_back(self, worker: Worker, healthy: bool) -> None:
        worker.kill()
        self._theirs.close()


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    if draw.byte() % 8 == 7:
        _check_plan(spoiled(draw, json.loads(json.dumps(_PLAN)), WORDS))
        return
    kind = draw.one(list(_READERS))
    workers = _Workers(_said(draw, kind))
    decoded = MemoryBudget()  # of its own: whatever else the process decoded may be given back at any moment
    try:
        with (
            mock.patch.object(read, "shared_workers", lambda settings: workers),
            mock.patch.object(read, "DECODE_MEMORY", decoded),
        ):
            found = _READERS[kind](OpenedMedia(b"file", "the file"))
    except (ValueError, WorkerError) as error:
        assert len(str(error)) < 4000, "a message as long as the reply"
    else:
        _check(found)
        del found
    gc.collect(0)
    assert not decoded.reserved, f"{decoded.reserved:,} bytes were not given back"


def _check_plan(value: Any) -> None:
    """A plan for a GPU's decoder, which the parent follows itself."""
    try:
        plan = read._parse_plan(value, "the file")
    except ValueError:
        return
    assert all(type(side) is int for side in plan.size)
    numbers = [*plan.chosen, *plan.chosen.values(), *(moment for run in plan.runs for moment in (run.key, *run.times))]
    assert all(type(number) is int for number in numbers)
    for run in plan.runs:
        assert all(
            type(one) is int or (one is None and place) for key in run.keys.values() for place, one in enumerate(key)
        )


def _said(draw: Draw, kind: str) -> bytes:
    """Messages as they go through the connection."""
    messages = [draw.one(_CALLS) for _ in range(draw.below(6))]
    result = _RESULTS[kind]
    if draw.byte() % 4 != 3:  # what the result asks for
        messages += [_CALLS[-1]] * 2
    if draw.flag():
        result = spoiled(draw, json.loads(json.dumps(result)), WORDS)
    messages.append({"result": result})
    if draw.flag():
        messages = spoiled(draw, json.loads(json.dumps(messages)), WORDS)
    out = b""
    for message in messages if isinstance(messages, list) else [messages]:
        text = json.dumps(message).encode() if draw.byte() % 16 != 15 else draw.bytes(20)
        out += _LENGTH.pack(len(text)) + text
    return out + draw.rest()


def _check(found: Any) -> None:
    for one in found if isinstance(found, list) else [found]:
        scaled = one if isinstance(one, read.ScaledImage) else one.image
        assert isinstance(scaled, read.ScaledImage)
        assert all(type(side) is int and side > 0 for side in scaled.size)
        assert scaled.arrays
        if isinstance(one, read.Frame):
            assert isinstance(one.seconds, Fraction)
        if isinstance(one, read.Page):
            assert type(one.number) is type(one.total) is int
        for array in scaled.arrays:
            assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3


def seeds() -> Iterator[bytes]:
    chance = random.Random(0)
    yield from (bytes([7, place, 0]) for place in range(30))
    yield from (bytes([0, kind, 2, 0, 5, 0, 0]) + bytes(8) for kind in range(3))
    yield from (chance.randbytes(40) for _ in range(40))
