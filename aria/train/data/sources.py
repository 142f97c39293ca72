"""Data sets on the disk: how many rows they have, and any row of them, without loading the others."""

from __future__ import annotations

import importlib
import json
import mmap
import re
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from aria.train.data.report import RowError

HUGGING_FACE = "hf:"


class Row(NamedTuple):
    """A row as it stands in its data set."""

    fields: Mapping[str, Any]
    where: str
    """``file:line``, counted from 1, or what is nearest to it."""
    folder: Path
    """What paths in the row count from."""


class Source(Protocol):
    """A data set. Several threads may read it."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """The place of a row, for messages."""
        ...

    def read(self, index: int) -> Row:
        """A row.

        Raises:
            RowError: it is not UTF-8, not JSON, or not an object.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when the rows do."""
        ...


class JsonLines:
    """A JSONL file. Only where its lines begin is kept in memory, 8 bytes each; blank lines are no rows."""

    def __init__(self, file: Path):
        self.file = file
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty; expected one JSON object a line")
        with file.open("rb") as opened:
            self._bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._lines, self._checksum = _index(self._bytes)
        if not len(self._lines):
            raise ValueError(f"{file} has only blank lines; expected one JSON object a line")

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return f"{self.file}:{self._lines[index] + 1}"

    def fingerprint(self) -> str:
        return f"{self.file.name}, {len(self):,} rows, {len(self._bytes):,} bytes, {self._checksum:08x}"

    def read(self, index: int) -> Row:
        line = int(self._lines[index])
        data, where = self._bytes[int(self._starts[line]) : int(self._starts[line + 1])], self.where(index)
        try:
            text = data.decode("utf-8-sig" if line == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise RowError("not UTF-8", f"byte {error.start} of the line is {data[error.start]:#04x}") from None
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError("not JSON", f"{error}; the line is {text.strip()!r:.60}") from None
        if not isinstance(fields, dict):
            raise RowError("not JSON", f"expected an object, but the line is {text.strip()!r:.60}")
        return Row(fields, where, self.file.parent)


def _index(data: mmap.mmap) -> tuple[np.ndarray, np.ndarray, int]:
    """Offsets of all lines, with the end; numbers (from 0) of those that are not blank; a checksum of everything."""
    piece, checksum = 1 << 26, 0
    found = []
    for start in range(0, len(data), piece):
        read = data[start : start + piece]
        checksum = zlib.crc32(read, checksum)
        part = np.frombuffer(read, dtype=np.uint8)
        found.append(np.flatnonzero(part == ord("\n")) + (start + 1))
    ends = np.concatenate(found)
    starts = np.concatenate(([0], ends, [] if len(ends) and ends[-1] == len(data) else [len(data)])).astype(np.int64)
    # Short lines may be blank: only those are looked at.
    short = np.flatnonzero(np.diff(starts) < 8)
    blank = [
        line
        for line in short.tolist()
        if not data[int(starts[line]) : int(starts[line + 1])].strip(b"\xef\xbb\xbf \t\r\n")
    ]
    return starts, np.setdiff1d(np.arange(len(starts) - 1), blank, assume_unique=True), checksum


class HuggingFace:
    """A data set of Hugging Face's ``datasets``: memory-mapped Arrow, read row by row."""

    def __init__(self, name: str, rows: Any, folder: Path):
        self._name, self._rows, self._folder = name, rows, folder

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        return f"{self._name}:{index + 1}"

    def fingerprint(self) -> str:
        return f"{self._name}, {len(self):,} rows, {self._rows._fingerprint}"

    def read(self, index: int) -> Row:
        try:
            fields = self._rows[index]
        except Exception as error:  # decoders of columns raise what they like
            raise RowError("not readable", f"{type(error).__name__}: {error}") from error
        return Row({key: value for key, value in fields.items() if value is not None}, self.where(index), self._folder)


def open_source(name: str, split: str = "train") -> Source:
    """A data set by its name.

    Args:
        name: a ``.jsonl`` file, a folder with ``<split>.jsonl``, a ``.parquet`` file, a folder that ``datasets`` has
            saved, or ``hf:owner/name`` or ``hf:owner/name:config``.
        split: of a folder or a data set of ``datasets``.

    Raises:
        FileNotFoundError: there is none of that name.
        ValueError: it is of no known kind, or empty.
        ImportError: it needs ``datasets``, which is not installed.
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
    if path.suffix == ".parquet":
        return _loaded(str(path), path.parent, lambda lib: lib.Dataset.from_parquet(str(path)))
    if path.suffix not in (".jsonl", ".ndjson"):
        raise ValueError(f"{path} should be a .jsonl or .parquet file, or a folder with {split}.jsonl")
    return JsonLines(path)


def _folder(folder: Path, split: str) -> Source:
    if (folder / f"{split}.jsonl").is_file():
        return JsonLines(folder / f"{split}.jsonl")
    if (folder / "dataset_dict.json").is_file():
        return _loaded(str(folder), folder, lambda lib: _split(lib.load_from_disk(str(folder)), split))
    if (folder / "state.json").is_file():
        return _loaded(str(folder), folder, lambda lib: lib.load_from_disk(str(folder)))
    others = sorted(file.name for file in folder.glob("*.jsonl"))
    there = f"there are {', '.join(others[:5])}: name the file itself" if others else "there is no .jsonl file at all"
    raise FileNotFoundError(f"{folder} has no {split}.jsonl; {there}")


def _split(sets: Mapping[str, Any], split: str) -> Any:
    if split not in sets:
        raise ValueError(f"it has no split {split!r}, only {', '.join(sets)}")
    return sets[split]


def _loaded(name: str, folder: Path, load: Any) -> HuggingFace:
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"{name} is read with the package datasets: pip install 'aria-moe[train]'") from error
    try:
        rows = load(library)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not len(rows):
        raise ValueError(f"{name} is empty")
    return HuggingFace(name, rows, folder)


class Sources:
    """Several data sets as one list of rows."""

    def __init__(self, names: Mapping[str, Any] | list[str], split: str = "train"):
        if not names:
            raise ValueError("[data] names no data set; set paths or mixer, or factory for a stream of your own")
        self.names = list(names)
        self._all = [open_source(name, split) for name in self.names]

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each."""
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
        """The place of a row."""
        source, own = self._find(index)
        return source.where(own)

    def read(self, index: int) -> Row:
        """A row; see :meth:`Source.read`."""
        source, own = self._find(index)
        return source.read(own)

    def fingerprint(self) -> list[str]:
        """Of each."""
        return [source.fingerprint() for source in self._all]
