"""Anonymous files shared between two processes: encoded input and decoded pixels."""

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
    """An open file that can be passed to another process."""

    descriptor: int
    size: int
    """Size in bytes."""
    path: str | None = None
    """Path of the file on systems that cannot pass descriptors (Windows)."""

    @classmethod
    def of_size(cls, size: int) -> SharedFile:
        """Zeroed memory of fixed size: neither side can invalidate the mapping of the other by truncating it."""
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
        """A file with a copy of the bytes."""
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
        """Map the file, which must not be empty. The memory stays valid as long as the mapping is referenced."""
        return map_shared(self.descriptor, self.size)

    def close(self) -> None:
        os.close(self.descriptor)
        if self.path is not None:
            with contextlib.suppress(OSError):  # Windows cannot delete mapped files
                Path(self.path).unlink()


def map_shared(descriptor: int, size: int) -> mmap.mmap:
    """Map the first bytes of a file as shared memory, prefaulted: faulting page by page takes several times as long."""
    if hasattr(mmap, "MAP_POPULATE"):
        return mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return mmap.mmap(descriptor, size)


def _unnamed() -> tuple[int, str | None]:
    """Create an empty file; returns its descriptor, and its path on systems without anonymous files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("aria", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), None
    if os.name == "posix":
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno()), None
    return tempfile.mkstemp(prefix="aria-")


def open_reader(source: bytes | SharedFile) -> BinaryIO:
    """Open bytes or a shared file for reading, at position 0. Each call returns an object with its own position."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return io.BufferedReader(PositionedReader(source.descriptor, source.size), 1 << 16)


class PositionedReader(io.RawIOBase):
    """A reader with its own position on a descriptor that others may share.

    Args:
        descriptor: Descriptor of a regular file. The caller keeps it open and closes it.
        size: Size of the file in bytes.
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
