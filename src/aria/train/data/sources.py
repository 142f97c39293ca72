"""Data sets on disk, with random access to their rows."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import threading
import zlib
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from aria.hub import read_json
from aria.train.data.content import content_hash
from aria.train.data.report import CONVERT, RowError

HUGGING_FACE = "hf:"
_PIECE = 1 << 20
_BLANK = b"\xef\xbb\xbf \t\r\n"
"""Bytes of blank lines: white space, and the byte order mark that some editors write."""
MOST_LINE = 256 << 20
"""Maximum bytes of a row. Base64 media in it are a third larger than their files."""
MOST_VALUES = 4_000_000
"""Maximum commas, colons and brackets of a row, each of which may become a value of a hundred bytes in memory."""


class Row(NamedTuple):
    """A row of a data set."""

    fields: Mapping[str, Any]
    where: str
    """``file:line``, counted from 1, or the closest equivalent."""
    folder: Path
    """Folder that paths in the row are relative to."""


class Source(Protocol):
    """A data set. Several threads may read it."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """The location of a row, for messages."""
        ...

    def read(self, index: int) -> Row:
        """A row.

        Raises:
            RowError: It is not UTF-8, not JSON, or not an object.
            ValueError: The file was changed since it was opened.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Changes if and only if the rows change; a copy of the files has the same."""
        ...

    @property
    def former_fingerprint(self) -> str:
        """The fingerprint of earlier versions."""
        ...


class JsonlFile:
    """A JSONL file. Offset, number and checksum of each line are in memory; blank lines are not rows.

    The file is read, not memory-mapped: a mapped file that another program truncates kills the process.
    """

    def __init__(self, file: Path):
        self.file = file
        # Offsets of all lines and of the end; numbers and checksums of rows.
        self._starts, self._lines, self._checksums = array("q", [0]), array("q"), array("I")
        self._checksum = 0
        # Kept open, so that a file that is replaced by renaming stays readable.
        self._opened, self._reading = file.open("rb", buffering=0), threading.Lock()
        lines = io.BufferedReader(self._opened)
        number = 0
        while line := lines.readline(MOST_LINE):
            size, checksum, blank = len(line), zlib.crc32(line), not line.strip(_BLANK)
            self._checksum = zlib.crc32(line, self._checksum)
            while not line.endswith(b"\n") and (line := lines.readline(_PIECE)):  # the rest of a long line
                size, checksum, blank = size + len(line), zlib.crc32(line, checksum), blank and not line.strip(_BLANK)
                self._checksum = zlib.crc32(line, self._checksum)
            self._starts.append(self._starts[-1] + size)
            if not blank:
                self._lines.append(number)
                self._checksums.append(checksum)
            number += 1
        lines.detach()
        if not self._size:
            raise ValueError(f"{file} is empty; expected one JSON object a line")
        if not len(self._lines):
            raise ValueError(f"{file} has only blank lines; expected one JSON object a line")
        first = self._bytes(0).strip(_BLANK) if self._length(0) <= MOST_LINE else b""
        if first == b"{" or (first[:1] == b"[" and first[1:].lstrip()[:1] in (b"", b"{")):
            raise ValueError(f"{file} is JSON over several lines or a list; expected one JSON object a line; {CONVERT}")

    def __del__(self) -> None:
        if hasattr(self, "_opened"):
            self._opened.close()

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def _size(self) -> int:
        """Size of the file when it was opened, in bytes."""
        return self._starts[-1]

    def where(self, index: int) -> str:
        return f"{self.file}:{self._lines[index] + 1}"

    @property
    def fingerprint(self) -> str:
        return f"{self.file.name}, {len(self):,} rows, {self._size:,} bytes, {self._checksum:08x}"

    former_fingerprint = fingerprint

    def read(self, index: int) -> Row:
        where = self.where(index)
        if (length := self._length(index)) > MOST_LINE:
            raise RowError("too long a line", f"it has {length:,} bytes; at most {MOST_LINE:,} are read")
        data = self._bytes(index)
        if sum(map(data.count, (b",", b":", b"[", b"{"))) > MOST_VALUES:
            raise RowError("too many values", f"it has more than {MOST_VALUES:,} commas, colons and brackets")
        try:
            # Concatenated files have byte order marks inside.
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RowError("not UTF-8", f"byte {error.start} of the line is {data[error.start]:#04x}") from None
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError("not JSON", f"{error}; the line is {text.strip()!r:.60}") from None
        if not isinstance(fields, dict):
            raise RowError("not JSON", f"expected an object, but the line is {text.strip()!r:.60}")
        return Row(fields, where, self.file.parent)

    def _length(self, index: int) -> int:
        line = self._lines[index]
        return self._starts[line + 1] - self._starts[line]

    def _bytes(self, index: int) -> bytes:
        """A line, which must be as it was when the file was opened."""
        start, length = self._starts[self._lines[index]], self._length(index)
        try:
            with self._reading:
                self._opened.seek(start)
                data = self._opened.read(length)
            size = os.fstat(self._opened.fileno()).st_size
        except OSError as error:
            raise OSError(f"{self.where(index)}: {error}") from error
        if zlib.crc32(data) == self._checksums[index]:
            return data
        if len(data) < length:
            changed = f"the file had {self._size:,} bytes and now has {size:,}, so this line is missing or incomplete"
        else:
            other = "" if size == self._size else f", and the file had {self._size:,} bytes and now has {size:,}"
            changed = f"this line has changed{other}"
        raise ValueError(
            f"{self.where(index)}: the file was changed while it was in use: {changed}. Restore the old content to "
            "resume; write new data under another name"
        )


class HuggingFace:
    """A data set of Hugging Face's ``datasets``: Arrow in its own cache, mapped into memory and read row by row.

    Args:
        name: Name in messages.
        rows: A ``datasets.Dataset``.
        folder: Folder that paths in rows are relative to.
    """

    def __init__(self, name: str, rows: Any, folder: Path):
        self._name, self._rows, self._folder = name, rows, folder
        self.former: str = rows._fingerprint
        """Fingerprint of ``datasets``, which depends on modification times."""

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self._name}:{index + 1}"

    @cached_property
    def fingerprint(self) -> str:
        # Files are identified by name without folders, as JSONL files are.
        name = self._name if self._name.startswith(HUGGING_FACE) else Path(self._name).name
        return f"{name}, {len(self):,} rows, content {content_hash(self._rows)}"

    @property
    def former_fingerprint(self) -> str:
        return f"{self._name}, {len(self):,} rows, {self.former}"

    def read(self, index: int) -> Row:
        try:
            fields = self._rows[index]
        except Exception as error:  # decoders of columns raise any exception
            raise RowError("not readable", f"{type(error).__name__}: {error}") from error
        return Row({key: value for key, value in fields.items() if value is not None}, self.where(index), self._folder)


def open_source(name: str, split: str = "train") -> Source:
    """Open a data set.

    Args:
        name: A ``.jsonl`` file, a folder with ``<split>.jsonl``, a ``.parquet`` file, a folder that ``datasets`` saved,
            or ``hf:owner/name`` or ``hf:owner/name:config``.
        split: Split of a folder or a data set of ``datasets``.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is of an unknown kind, or empty.
        ImportError: It needs ``datasets``, which is not installed.
    """
    if name.startswith(HUGGING_FACE):
        repository, _, config = name.removeprefix(HUGGING_FACE).partition(":")
        if not repository:
            raise ValueError(f"{name!r} names no data set of the Hub; expected hf:owner/name or hf:owner/name:config")
        return _loaded(name, Path(), lambda lib: lib.load_dataset(repository, config or None, split=split))
    path = Path(name).expanduser()
    if not path.exists():
        hint = f"; a data set of the Hub is hf:{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise FileNotFoundError(f"no data set at {name!r}{hint}")
    if path.is_dir():
        return _folder(path, split)
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _loaded(str(path), path.parent, lambda lib: lib.Dataset.from_parquet(str(path)))
    if kind not in (".jsonl", ".ndjson"):
        raise ValueError(
            f"{path} should be a .jsonl or .parquet file, or a folder with {split}.jsonl{_other_format(path)}"
        )
    return JsonlFile(path)


def _other_format(file: Path) -> str:
    """Advice for a file of an unsupported format."""
    kind = file.suffix.lower()
    if kind == ".json":
        try:
            lines = JsonlFile(file)
            first = lines.read(0).fields
            if len(lines) > 1 or {"messages", "text"} & first.keys():
                return "; it holds one JSON object a line: name it .jsonl"
        except ValueError:
            pass
        return f"; this is one JSON value, such as a list of rows: {CONVERT}"
    if kind in (".txt", ".md"):
        return f"; this is plain text: {CONVERT}"
    if kind in (".csv", ".tsv"):
        return f"; this is a table: {CONVERT}"
    if kind in (".gz", ".zst", ".xz", ".bz2", ".zip"):
        return "; this is compressed: unpack it first"
    if kind == ".arrow":
        return "; name the folder that datasets saved, which contains this file"
    return ""


def _folder(folder: Path, split: str) -> Source:
    if (folder / f"{split}.jsonl").is_file():
        return JsonlFile(folder / f"{split}.jsonl")
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits")
        splits = splits if isinstance(splits, list) else []
        if split not in splits:
            raise ValueError(f"{folder}: it has no split {split!r}, only {', '.join(map(str, splits)):.200}")
        return _saved(folder, folder / split)
    if (folder / "state.json").is_file():
        return _saved(folder, folder)
    others = sorted(file for pattern in ("*.jsonl", "*.parquet") for file in folder.glob(pattern))
    hint = f"there are {', '.join(file.name for file in others[:5])}: name the file itself"
    if not others:
        hint = "there is no .jsonl file at all"
        found = (file for kind in ("json", "txt", "md", "csv", "tsv") for file in sorted(folder.glob(f"*.{kind}")))
        if (file := next(found, None)) is not None:
            hint += f", only {file.name}{_other_format(file)}"
    raise FileNotFoundError(f"{folder} has no {split}.jsonl; {hint}")


def _saved(folder: Path, part: Path) -> HuggingFace:
    """A folder that ``datasets`` saved, read through its cache, because the files themselves may be rewritten."""
    if not (part / "state.json").is_file():
        raise FileNotFoundError(f"{part} has no state.json; expected a folder that datasets saved")
    state = read_json(part / "state.json")
    try:
        names = [str(file["filename"]) for file in state["_data_files"]]
        former = str(state["_fingerprint"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{part / 'state.json'} names no files of a data set ({error!r})") from None
    if strange := [name for name in names if Path(name).name != name or "\\" in name or name == ".."]:
        raise ValueError(f"{part / 'state.json'} names files outside its folder: {strange[0]!r:.100}")
    files = [str(part / name) for name in names]
    source = _loaded(str(folder), folder, lambda lib: lib.load_dataset("arrow", data_files=files, split="train"))
    source.former = former
    return source


def _loaded(name: str, folder: Path, load: Any) -> HuggingFace:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"{name} is read with the package datasets: pip install 'aria-moe[train]'") from error
    try:
        rows = load(library)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from error
    except library.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not len(rows):
        raise ValueError(f"{name} is empty")
    return HuggingFace(name, rows, folder)


class Sources:
    """Several data sets as one list of rows."""

    def __init__(self, names: Mapping[str, Any] | list[str], split: str = "train"):
        if not names:
            raise ValueError("[data] names no data set; set paths or mixer, or factory for a custom stream")
        self.names = list(names)
        self._all = [open_source(name, split) for name in self.names]

    @cached_property
    def counts(self) -> list[int]:
        """Number of rows of each."""
        return [len(source) for source in self._all]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._all[number], index - int(self._starts[number])

    def where(self, index: int) -> str:
        """The location of a row."""
        source, own = self._find(index)
        return source.where(own)

    def read(self, index: int) -> Row:
        """A row; see :meth:`Source.read`."""
        source, own = self._find(index)
        return source.read(own)

    def fingerprint(self) -> list[str]:
        """Fingerprint of each."""
        return [source.fingerprint for source in self._all]

    def has(self, fingerprints: Sequence[str]) -> bool:
        """Whether the fingerprints, which an earlier version may have written, are those of these rows."""
        pairs = zip(self._all, fingerprints, strict=False)
        return len(self._all) == len(fingerprints) and all(
            saved in (source.former_fingerprint, source.fingerprint) for source, saved in pairs
        )
