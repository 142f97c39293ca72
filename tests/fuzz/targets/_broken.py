"""A target with faults, to test how they are reported; it is not listed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

MEMORY = 32 << 20


def fuzz(data: bytes) -> None:
    if data == b"crash":
        ctypes.string_at(0)
    if data == b"vanish":
        os._exit(3)
    if data == b"memory":
        len(b"x" * (256 << 20))
    assert data != b"fault", "it came"


def seeds() -> Iterator[bytes]:
    yield os.environ.get("BROKEN_BY", "crash").encode()
