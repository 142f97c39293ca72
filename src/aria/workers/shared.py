"""Files without a name that two processes share: what is decoded, and the pixels that come of it."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import tempfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

if os.name == "posix":
    import fcntl

_PIECE = 1 << 26


class SharedFile(NamedTuple):
    """An open file that another process can be given."""

    descriptor: int
    size: int
    """Bytes."""
    path: str | None = None
    """Its name, where descriptors cannot be passed to other processes (Windows)."""

    @classmethod
    def of_size(cls, size: int) -> SharedFile:
        """Zeros in memory, of a size that stays: neither side can make the other's mapping invalid."""
        descriptor, path = _unnamed()
        try:
            os.ftruncate(descriptor, size)
            if hasattr(fcntl, "F_ADD_SEALS") and hasattr(os, "memfd_create"):
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except BaseException:
            cls(descriptor, size, path).close()
            raise
        return cls(descriptor, size, path)

    @classmethod
    def of_bytes(cls, data: bytes) -> SharedFile:
        """A copy of bytes."""
        descriptor, path = _unnamed()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest[:_PIECE]) :]
        except BaseException:
            cls(descriptor, len(data), path).close()
            raise
        return cls(descriptor, len(data), path)

    def map(self) -> mmap.mmap:
        """Its bytes, which stay as long as somebody holds the mapping. It must not be empty."""
        return map_shared(self.descriptor, self.size)

    def close(self) -> None:
        os.close(self.descriptor)
        if self.path is not None:
            with contextlib.suppress(OSError):  # Windows keeps what is map_shared
                Path(self.path).unlink()


def map_shared(descriptor: int, size: int) -> mmap.mmap:
    """The first bytes of a file as memory that both sides write to, all of it there at once: a page at a time takes
    several times as long."""
    if hasattr(mmap, "MAP_POPULATE"):
        return mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return mmap.mmap(descriptor, size)


def _unnamed() -> tuple[int, str | None]:
    """The descriptor of a new empty file, and its path where it cannot do without one."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("aria", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), None
    if os.name == "posix":
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno()), None
    return tempfile.mkstemp(prefix="aria-")


def open_reader(source: bytes | SharedFile) -> BinaryIO:
    """Bytes or a file, open for reading at the beginning; each has a position of its own."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return io.BufferedReader(PositionedReader(source.descriptor, source.size), 1 << 16)  # type: ignore[return-value]


class PositionedReader(io.RawIOBase):
    """A file read through a descriptor, at a position of its own: others may read through the same one.

    Args:
        descriptor: of a regular file; who opened it keeps it open and closes it.
        size: bytes of the file.
    """

    def __init__(self, descriptor: int, size: int):
        self._descriptor, self._size, self._position = descriptor, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError("a position before the beginning of the file")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]  # any writable buffer
        count = min(len(view), max(self._size - self._position, 0))
        if not count:
            return 0
        if hasattr(os, "preadv"):
            count = os.preadv(self._descriptor, [view[:count]], self._position)
        elif hasattr(os, "pread"):
            data = os.pread(self._descriptor, count, self._position)
            count = len(data)
            view[:count] = data
        else:  # Windows: descriptors are not shared there
            os.lseek(self._descriptor, self._position, os.SEEK_SET)
            data = os.read(self._descriptor, count)
            count = len(data)
            view[:count] = data
        self._position += count
        return count
