"""Output files of jobs: JSON Lines, each line on the disk before the next, so that an interrupted job can resume."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON in UTF-8, with its newline."""
    try:
        text = json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a file name that is not valid Unicode: escapes can hold it
        text = json.dumps(record).encode()
    return text + b"\n"


class Journal:
    """A JSON Lines file that one process at a time appends to. A lock file beside it, ``.NAME.lock``, sees to that.

    First :meth:`read` what an earlier run wrote, to the end; then :meth:`write`. A process that is killed leaves whole
    lines and at most one partial line, which is truncated once all lines have been read. A line that could only be
    written in part, for example because the disk is full, is truncated before the next one is written.

    Raises:
        ValueError: Another process is writing to the file.
        OSError: The file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        target = self.path.resolve()
        # Any thread may close the journal.
        self._lock = FileLock(target.with_name(f".{target.name}.lock"), thread_local=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(f"{self.path} is being written by another process; wait for it, or name another") from None
        try:
            self._file = self.path.open("a+b", buffering=0)
        except BaseException:
            self._lock.release()
            raise
        self._read = False
        self._size = 0
        """Size of all complete lines, in bytes."""
        self._torn = False
        """Whether a partial line may follow them."""
        # Serializes writers, and keeps them from writing after close().
        self._writing = threading.Lock()

    def read(self) -> Iterator[dict[str, Any]]:
        """Records of earlier runs, in order. Reading to the end also truncates a partial last line.

        Raises:
            ValueError: A line is not a JSON object, so this is some other file; it is left unchanged.
        """
        size = 0
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
                size += len(line)
                if not line.endswith(b"\n"):
                    self._append(b"\n")
                    size += 1
                    break
        self._size, self._torn = size, True
        self._truncate()
        self._read = True

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line; it is on the disk when this returns. Thread-safe.

        Raises:
            OSError: The disk is full, the journal is closed, or an earlier partial line cannot be truncated.
        """
        assert self._read, "read() the file to its end before writing to it"
        line = json_line(record)
        with self._writing:
            if self._file.closed:
                raise OSError(f"{self.path} was closed")
            self._truncate()
            try:
                self._append(line)
                os.fsync(self._file.fileno())
            except BaseException:
                self._torn = True
                with contextlib.suppress(OSError):  # tried again before the next line
                    self._truncate()
                raise
            self._size += len(line)

    def _truncate(self) -> None:
        """Remove a partial last line."""
        if self._torn:
            try:
                self._file.truncate(self._size)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"a partial line cannot be truncated ({error.strerror}); nothing more is written",
                    str(self.path),
                ) from error
            self._torn = False

    def _append(self, data: bytes) -> None:
        """Write all bytes; an unbuffered file may take only some of them at a time."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file, after a line that is being written, and release the lock."""
        with self._writing:
            self._file.close()
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class RecordStream:
    """Output that is never read back, such as standard output; every record is flushed."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._writing = threading.Lock()

    def read(self) -> Iterator[dict[str, Any]]:
        """No records."""
        return iter(())

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a line. Thread-safe."""
        with self._writing:
            self._file.write(json_line(record))
            self._file.flush()
