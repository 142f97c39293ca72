"""A content hash of a table of Hugging Face's ``datasets``.

Equal rows have equal hashes, however they are stored: a copy of the files, another cache, other chunks or another
version of the library change nothing.
"""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

from aria.train.data.order import permutation

WINDOW = 256
"""Rows per window."""
MOST_BYTES = 8 << 30
"""Bytes that are hashed at most, which takes about ten seconds. A larger data set is sampled."""


def content_hash(rows: Any, most_bytes: int = MOST_BYTES) -> str:
    """A hash of a data set's columns.

    Args:
        rows: A ``datasets.Dataset``.
        most_bytes: After this many bytes, the remaining windows of rows are left out. Windows come in a fixed order
            that is spread over the data set, so data sets that differ in most rows have different hashes; a change in
            a few rows of a larger data set may be missed.

    Returns:
        32 hexadecimal digits, after ``sampled`` if rows were left out.
    """
    table = rows.with_format("arrow")
    digest = _Digest()
    digest.add(repr((len(rows), list(rows.column_names))).encode())
    windows = -(-len(rows) // WINDOW)
    for window in permutation(windows, 0).tolist():
        if digest.size >= most_bytes:
            return f"sampled {digest.hexdigest()}"
        for column in table[window * WINDOW : (window + 1) * WINDOW].columns:
            digest.array(column.combine_chunks())
    return digest.hexdigest()


class _Digest:
    """A hash of Arrow arrays by value: offsets, padding and bytes under nulls do not count."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._arrow: Any = importlib.import_module("pyarrow")
        self._compute: Any = importlib.import_module("pyarrow.compute")
        self.size = 0

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, data: Any) -> None:
        """Hash the length of the bytes and the bytes."""
        view = memoryview(data).cast("B")
        self._hash.update(len(view).to_bytes(8, "little"))
        self._hash.update(view)
        self.size += len(view)

    def array(self, array: Any) -> None:
        """Hash all values of an array, in order."""
        arrow, compute, types = self._arrow, self._compute, self._arrow.types
        if isinstance(array, arrow.ChunkedArray):
            array = arrow.concat_arrays(array.chunks) if array.num_chunks else arrow.array([], array.type)
        if isinstance(array, arrow.ExtensionArray):
            array = array.storage
        kind = array.type
        if types.is_struct(kind):
            self._nulls(array)
            for field, values in zip(kind, array.flatten(), strict=True):
                self.add(field.name.encode())
                self.array(values)
        elif types.is_list(kind) or types.is_large_list(kind):
            self._lengths(array, compute.list_value_length(array))
            self.array(array.flatten())
        elif (
            types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
        ):
            self._lengths(array, compute.binary_length(array))
            values = array.drop_null().cast(arrow.large_binary())
            first, last = values.offset, values.offset + len(values)
            offsets = memoryview(values.buffers()[1]).cast("q") if len(values) else (0,) * (last + 1)
            data = values.buffers()[2]
            self.add(memoryview(data)[offsets[first] : offsets[last]] if data is not None else b"")
        elif types.is_integer(kind) or types.is_floating(kind):
            self._nulls(array)
            self.add(array.drop_null().to_numpy(zero_copy_only=False).tobytes())
        else:
            self.add(repr(array.to_pylist()).encode("utf-8", "surrogatepass"))

    def _nulls(self, array: Any) -> None:
        self.add(array.is_valid().to_numpy(zero_copy_only=False).tobytes())

    def _lengths(self, array: Any, lengths: Any) -> None:
        """Hash the length of each value; -1 for null."""
        self.add(lengths.cast(self._arrow.int64()).fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
