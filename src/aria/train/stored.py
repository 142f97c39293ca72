"""Reading untrusted checkpoints of runs: nothing in them is executed.

``torch.distributed.checkpoint`` unpickles its ``.metadata`` and every value that is not a tensor, which can run any
code. Here ``.metadata`` is read by a pickle machine that cannot call anything, and its contents are checked before
PyTorch sees them; everything else is read with ``weights_only=True``.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from aria import private_api
from aria.checkpoint.pickles import Calls, Machine, Named, Record, RefusedError

_MOST_STEPS = 1 << 24
"""Maximum operations in ``.metadata``: about 150 per tensor, and 60 more for each shard of it."""
_MOST_VALUE = 64 << 20
"""Maximum bytes of values that are not tensors: a rank's position in the data and its random states."""
_MOST_AXES = 16
_FILE = re.compile(r"__\d+_\d+\.distcp", re.ASCII)
_GLOBAL = re.compile(r"GLOBAL (\S+)|function (\S.*)|got (<class .*?>)")
"""Where PyTorch's messages name what they refuse."""

_STORAGE_INFO = private_api.storage_info()
_METADATA = "torch.distributed.checkpoint.metadata."
_DTYPES = {
    f"torch.{name}": dtype
    for name in dir(torch)
    if isinstance(dtype := getattr(torch, name), torch.dtype) and str(dtype) == f"torch.{name}"
}
_CALLS: Calls = {
    **{
        _METADATA + kind: lambda kind=kind: Record(kind)
        for kind in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
            "MetadataIndex", "StorageMeta",
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": lambda: Record("_StorageInfo"),
    **dict.fromkeys(_DTYPES),
    "torch.Size": lambda sizes: sizes,
    # Not used: memory formats, and the path where the checkpoint was written.
    "torch.serialization._get_layout": lambda name: None,
    _METADATA + "_MEM_FORMAT_ENCODING": lambda number: None,
    **{
        f"{module}.{kind}Path": lambda *parts: None
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows", "PurePosix", "PureWindows")
    },
}  # fmt: skip


class CheckpointReader(dcp.FileSystemReader):
    """Reads a checkpoint's folder."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._folder = folder
        self._known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Description of the checkpoint's tensors.

        Raises:
            ValueError: It asks for something else, or is damaged.
        """
        if self._known is None:
            file = self._folder / ".metadata"
            try:
                with file.open("rb") as opened:
                    self._known = _metadata(Machine(opened, _CALLS, _MOST_STEPS).run())
            except RefusedError as error:
                raise ValueError(f".metadata has {error}") from error
        self._known.storage_meta = StorageMeta(load_id=self.load_id)
        return self._known

    def _slice_file(self, file: IO[bytes], sinfo: Any) -> IO[bytes]:
        _check_archive(_Part(file, sinfo.offset, sinfo.length), sinfo.length, sinfo.relative_path)
        return super()._slice_file(file, sinfo)

    def tensor_bytes(self) -> int:
        """Bytes of all files of tensors: an upper bound for the tensors."""
        return sum(file.stat().st_size for file in self._folder.glob("*.distcp"))


class _Part(io.RawIOBase):
    """A part of a file as a file; PyTorch's views do not support seeking from the end."""

    def __init__(self, file: IO[bytes], offset: int, nbytes: int):
        self._file, self._offset, self._nbytes, self._at = file, offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._nbytes)[whence])
        return self._at

    def readinto(self, out: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(out), self._nbytes - self._at)))
        out[: len(data)] = data
        self._at += len(data)
        return len(data)


class Planner(dcp.DefaultLoadPlanner):
    """Loads what is read into a state."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        # PyTorch's method unpickles: give it the safely read value, saved again.
        again = io.BytesIO()
        torch.save(read_value(value, read_item.dest_index.fqn), again)
        again.seek(0)
        super().load_bytes(read_item, again)


def write_value(value: Any, file: Path) -> None:
    """Write plain values and tensors for :func:`read_value`.

    Raises:
        ValueError: It holds something else, and could not be read again.
        OSError: It cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    try:
        read_value(buffer, file.name)
    except ValueError as error:
        raise ValueError(
            f"state_dict() of a stream may hold only plain values and tensors, but its result could not be read again: "
            f"{error}"
        ) from error
    file.write_bytes(buffer.getbuffer())


def read_value(file: Path | IO[bytes], name: str) -> Any:
    """Read plain values and tensors that ``torch.save`` wrote.

    Raises:
        ValueError: It holds something else, which is named, or is damaged.
    """
    try:
        if isinstance(file, Path):
            with file.open("rb") as opened:
                return read_value(opened, name)
        size = file.seek(0, os.SEEK_END)
        if size > _MOST_VALUE:
            raise ValueError(f"{name} has {size:,} bytes; at most {_MOST_VALUE:,} are read")
        _check_archive(file, size, name)
        with torch.serialization.safe_globals(_NUMPY):
            return _plain(torch.load(file, map_location="cpu", weights_only=True))
    except RecursionError:
        raise ValueError(f"{name} holds values that are nested too deeply") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name} {refusal(error)}") from error


def refusal(error: pickle.UnpicklingError) -> str:
    """What PyTorch refused to read, without its advice to disable the check."""
    found = _GLOBAL.search(str(error))
    asks = f"asks for {next(filter(None, found.groups()))}" if found else "is not a pickle of plain values"
    return f"{asks}; only plain values and tensors are read, and nothing was run"


def _check_archive(file: Any, size: int, name: str) -> None:
    """Refuse what ``torch.save`` does not write: other formats and compressed archives."""
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name} is not what torch.save writes ({error})") from error
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or sum(i.file_size for i in infos) > size:
        raise ValueError(f"{name} is compressed, which torch.save never does")
    file.seek(0)


class _NumpyArray:
    """Stand-in for ``numpy.ndarray``, which holds NumPy's random state in checkpoints of earlier versions."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, dtype, _, data = state
        if not isinstance(dtype, _NumpyDType) or dtype.code != "u4" or not isinstance(data, bytes):
            raise pickle.UnpicklingError("got <class 'numpy.ndarray'>")
        self.values = list(memoryview(data).cast("I"))


class _NumpyDType:
    """Stand-in for ``numpy.dtype``."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            self.code = ""


def _reconstruct(*_: Any) -> _NumpyArray:
    return _NumpyArray()


_NUMPY: list[Any] = [
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (_NumpyArray, "numpy.ndarray"),
    (_NumpyDType, "numpy.dtype"),
]
"""Stand-ins, because NumPy's own classes accept states that make them read memory out of bounds."""


def _plain(value: Any) -> Any:
    """The value with lists of numbers in place of arrays."""
    if isinstance(value, _NumpyArray):
        return value.values
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _metadata(found: Any) -> Metadata:
    """PyTorch's description of a checkpoint, with every part checked."""
    if not isinstance(found, Record) or found.kind != "Metadata":
        raise RefusedError("something else than a description of tensors")
    try:
        stored = {_index(key): _place(value) for key, value in found["storage_data"].items()}
        tensors = {_text(name): _tensor(entry) for name, entry in found["state_dict_metadata"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"no whole description of its tensors ({error})") from error
    return Metadata(tensors, storage_data=stored)


def _tensor(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _kind(entry, "BytesStorageMetadata", "TensorStorageMetadata") == "BytesStorageMetadata":
        return BytesStorageMetadata()
    _kind(entry["properties"], "TensorProperties")
    dtype = entry["properties"].state[0]
    if not isinstance(dtype, Named) or dtype.name not in _DTYPES:
        raise RefusedError("a tensor without a dtype")
    for chunk in entry["chunks"]:
        _kind(chunk, "ChunkStorageMetadata")
    chunks = [ChunkStorageMetadata(_sizes(chunk["offsets"]), _sizes(chunk["sizes"])) for chunk in entry["chunks"]]
    return TensorStorageMetadata(TensorProperties(_DTYPES[dtype.name]), _sizes(entry["size"]), chunks)


def _index(key: Any) -> MetadataIndex:
    _kind(key, "MetadataIndex")
    offset, index = key.state.get("offset"), key.state.get("index")
    return MetadataIndex(
        _text(key["fqn"]), None if offset is None else _sizes(offset), None if index is None else _number(index)
    )


def _place(value: Any) -> Any:
    _kind(value, "_StorageInfo")
    file = _text(value["relative_path"])
    if not _FILE.fullmatch(file):
        raise RefusedError(f"tensors in the file {file!r:.100}; expected names such as __0_0.distcp")
    if value.state.get("transform_descriptors"):
        raise RefusedError("tensors that are compressed or encrypted")
    return _STORAGE_INFO(file, _number(value["offset"]), _number(value["length"]))


def _kind(value: Any, *kinds: str) -> str:
    if not isinstance(value, Record) or value.kind not in kinds:
        raise RefusedError(f"something else than {' or '.join(kinds)}")
    return value.kind


def _sizes(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or len(value) > _MOST_AXES:
        raise RefusedError("a shape that is none")
    return torch.Size([_number(size) for size in value])


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise RefusedError(f"the size {value!r:.40}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise RefusedError("a name that is none")
    return str(value)
