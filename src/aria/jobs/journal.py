"""The file that a job writes its answers into: whole lines of JSON, on the disk before the next, whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FAR = 1 << 40
"""Windows locks bytes, not files: this one, beyond the end of any journal, is in nobody's way."""


def json_line(record: Mapping[str, Any]) -> bytes:
    """One line of JSON in UTF-8, its end included."""
    try:
        text = json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file's name that is not valid Unicode: escapes hold it
        text = json.dumps(record).encode()
    return text + b"\n"


class Journal:
    """JSON objects, one a line, for one process at a time.

    First :meth:`read` what an earlier run wrote, to the end; then :meth:`write`. A process that was killed leaves whole
    lines and at most the beginning of one more, which is cut away when all lines have been read. A line that could only
    be written in part, as on a disk that is full, is cut away before any other is written.

    Raises:
        ValueError: another process is writing into the file.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = self.path.open("a+b", buffering=0)
        self._read = False
        self._whole = 0
        """Bytes of lines that are on the disk."""
        self._torn = False
        """Whether there may be bytes behind them."""
        # One writer at a time, and none after the end: threads write.
        self._writing = threading.Lock()
        try:
            _lock(self._file.fileno())
        except OSError:
            self._file.close()
            raise ValueError(f"{self.path} is being written by another process; wait for it, or name another") from None

    def read(self) -> Iterator[dict[str, Any]]:
        """What was written before, in order. Read to the end, this also mends the end of the file.

        Raises:
            ValueError: a line is not a JSON object, so this is some other file; nothing of it is changed.
        """
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("not an object")
                except (ValueError, RecursionError):
                    if not line.endswith(b"\n") and line.startswith(b"{"):
                        break
                    raise ValueError(
                        f"line {number} of {self.path} is not a JSON object; name an earlier run's output or a new file"
                    ) from None
                yield record
                whole += len(line)
                if not line.endswith(b"\n"):
                    self._append(b"\n")
                    whole += 1
                    break
        self._whole, self._torn = whole, True
        self._cut()
        self._read = True

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line; it is on the disk when this returns. Any thread may call it.

        Raises:
            OSError: there is no room, the journal was closed, or a line before could neither be written nor cut away.
        """
        assert self._read, "what the file holds has to be read before anything is added to it"
        line = json_line(record)
        with self._writing:
            if self._file.closed:
                raise OSError(f"{self.path} was closed")
            self._cut()
            try:
                self._append(line)
                os.fsync(self._file.fileno())
            except BaseException:
                self._torn = True
                with contextlib.suppress(OSError):  # tried again before the next line
                    self._cut()
                raise
            self._whole += len(line)

    def _cut(self) -> None:
        """Leave whole lines only."""
        if self._torn:
            try:
                self._file.truncate(self._whole)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"the beginning of a line that could not be written cannot be cut away ({error.strerror}); nothing "
                    "more is written",
                    str(self.path),
                ) from error
            self._torn = False

    def _append(self, data: bytes) -> None:
        """All of it: an unbuffered file takes as much as it likes."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Waits for a line that is being written."""
        with self._writing:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Stream:
    """The same for records that nobody reads again: they are passed on, and flushed one by one."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._writing = threading.Lock()

    def read(self) -> Iterator[dict[str, Any]]:
        """Nothing."""
        return iter(())

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass a line on. Any thread may call it."""
        with self._writing:
            self._file.write(json_line(record))
            self._file.flush()


def _lock(descriptor: int) -> None:
    """Until the file is closed or the process ends, however it ends."""
    if sys.platform == "win32":
        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
