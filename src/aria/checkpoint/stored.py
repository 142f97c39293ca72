"""Tensors in files: dtype, shape and byte ranges, checked before any weight is read."""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from aria.hub import MAX_JSON_BYTES, parse_json

_TEXT_BLOCK = 1 << 20
_MOST_AXES = 8

SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_DTYPE_OF_CODE = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of bytes in a file."""

    file: Path
    offset: int
    nbytes: int
    text: bool = False
    """Whether the bytes are UTF-8 text with one character per byte, as pickle protocol 2 writes binary data."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in one or more files, row-major, little-endian."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def seekable(self) -> bool:
        """Whether reading can start anywhere; text must be read from its beginning."""
        return not any(segment.text for segment in self.segments)

    def read(self, start: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``start`` on. Text is read as a whole, see :meth:`read_text`."""
        assert self.seekable and start + len(out) <= self.nbytes, "read past the end of a tensor"
        for segment in self.segments:
            if start >= segment.nbytes:
                start -= segment.nbytes
                continue
            part = out[: segment.nbytes - start]
            if not part:
                return
            # One handle per call, so that threads have separate positions and read-ahead. `readinto` is the only call
            # that reads directly into given memory on every platform without holding the GIL.
            with segment.file.open("rb", buffering=0) as file:
                file.seek(segment.offset + start)
                _read_exactly(file, part)
            out, start = out[len(part) :], 0

    def read_text(self) -> bytearray:
        """All bytes of a tensor that is stored as text."""
        out, filled = bytearray(self.nbytes), 0
        for segment in self.segments:
            decoder = codecs.getincrementaldecoder("utf-8")()
            with segment.file.open("rb") as file:
                file.seek(segment.offset)
                left = segment.nbytes
                while left:
                    block = file.read(min(left, _TEXT_BLOCK))
                    if not block:
                        raise ValueError(f"{segment.file} ended while its weights were being read; fetch it again")
                    left -= len(block)
                    try:
                        data = decoder.decode(block, final=not left).encode("latin1") if segment.text else block
                    except UnicodeError as error:
                        raise ValueError(f"{segment.file} is corrupt at byte {segment.offset}: {error}") from error
                    if filled + len(data) <= len(out):
                        out[filled : filled + len(data)] = data
                    filled += len(data)
        if filled != len(out):
            raise ValueError(
                f"{self.segments[0].file} is corrupt: {filled} bytes for an array of {len(out)}; fetch it again"
            )
        return out


def _read_exactly(file: BinaryIO, out: memoryview) -> None:
    while out:
        count = file.readinto(out)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{file.name} ended while its weights were being read; fetch it again")
        out = out[count:]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the offset of the tensors' bytes.

    The safetensors library checks it (offsets without gaps or overlaps, sizes against the file's length), after its
    size is checked here: the library would accept a header of 100 MB, with a million tensors.

    Raises:
        ValueError: The file is corrupt or truncated.
    """
    size = 0
    try:
        with file.open("rb") as opened:
            nbytes, size = int.from_bytes(opened.read(8), "little"), os.fstat(opened.fileno()).st_size
            if nbytes > min(size, MAX_JSON_BYTES):
                raise ValueError(f"its header would have {nbytes:,} bytes; at most {MAX_JSON_BYTES:,} are read")
            header = parse_json(opened.read(nbytes), "its header")
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is not a valid safetensors file ({size} bytes: {error}); fetch it again") from error
    header.pop("__metadata__", None)
    for key, entry in header.items():
        if len(entry["shape"]) > _MOST_AXES:
            raise ValueError(f"{file}: {key:.200} has {len(entry['shape']):,} axes; at most {_MOST_AXES} are read")
    return header, 8 + nbytes


def read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of a safetensors file.

    Their bytes are read by :meth:`StoredTensor.read`, because the library returns new tensors: a copy beside the
    parameter, and by default mapped pages of the whole file, which count as resident memory.

    Raises:
        ValueError: The file is corrupt or truncated, or has a dtype that is not floating point.
    """
    header, start = read_header(file)
    tensors = {}
    for key, entry in header.items():
        dtype = dtype_of_code(entry["dtype"], key, file)
        begin, end = entry["data_offsets"]
        tensors[key] = StoredTensor(dtype, tuple(entry["shape"]), (Segment(file, start + begin, end - begin),))
    return tensors


def dtype_of_code(code: str, key: str, file: Path | str) -> torch.dtype:
    """The dtype of tensor ``key`` of ``file`` in a safetensors header.

    Raises:
        ValueError: It is not floating point.
    """
    dtype = _DTYPE_OF_CODE.get(code)
    if dtype is None:
        raise ValueError(
            f"{key:.200} in {file} is stored as {code}, expected one of {', '.join(_DTYPE_OF_CODE)}; "
            "a quantized checkpoint cannot be loaded, use the bfloat16 weights (rhymes-ai/Aria)"
        )
    return dtype


def names(items: Sequence[str], limit: int = 6) -> str:
    """A list for an error message: the first few, and the number of others."""
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


def describe(faults: Mapping[str, Sequence[str]]) -> str:
    """Kinds of faults with their tensors, for an error message; empty kinds are left out."""
    return "; ".join(f"{len(keys)} {fault}: {names(keys)}" for fault, keys in faults.items() if keys)
