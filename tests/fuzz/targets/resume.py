"""Untrusted training checkpoints: rejected, or plain values, tensors, and a description whose files lie in the
folder. Nothing that they name is ever called."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from aria.train.state import _readable
from aria.train.stored import CheckpointReader, read_value
from tests.fuzz.files import folder

MEMORY = 128 << 20
LONGEST = 3000
WORDS = (
    *(
        "cposix\nsystem\n",
        "cbuiltins\neval\n",
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "ctorch\nFloatStorage\n",
        "\x80\x02",
    ),
    *(
        "numpy._core.multiarray",
        "_reconstruct",
        "storage",
        "cpu",
        "torch.distributed.checkpoint.metadata",
        "../a",
        "R.",
        "b.",
    ),
)


def fuzz(data: bytes) -> None:
    if data[:1] == b"m":
        _check_metadata(data[1:])
    else:
        _check_value(data[1:] if data[:1] == b"a" else _archive(data[1:]))
    assert not _trace().exists(), "it ran"


def _trace() -> Path:
    return folder("resume") / "it-ran"


def _check_metadata(content: bytes) -> None:
    (folder("resume") / ".metadata").write_bytes(content)
    try:
        found = CheckpointReader(folder("resume")).read_metadata()
    except ValueError as error:
        assert len(str(error)) < 2000, "a message as long as the file"
        return
    for name, entry in found.state_dict_metadata.items():
        assert isinstance(name, str)
        if isinstance(entry, TensorStorageMetadata):
            assert isinstance(entry.properties.dtype, torch.dtype)
            assert all(size >= 0 for size in entry.size)
    for place in found.storage_data.values():
        assert Path(place.relative_path).name == place.relative_path
        assert place.offset >= 0 and place.length >= 0


def _check_value(content: bytes) -> None:
    try:
        with _readable(folder("resume")):
            found = read_value(io.BytesIO(content), "the value")
    except ValueError:
        return
    _check_plain(found)


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, one in value.items():
            _check_plain(key)
            _check_plain(one)
    elif isinstance(value, list | tuple | set):
        for one in value:
            _check_plain(one)
    elif isinstance(value, torch.Tensor):
        value.sum() if value.layout == torch.strided else value.layout  # its memory is its own


def _archive(pickled: bytes) -> bytes:
    """What ``torch.save`` writes, with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(torch.arange(4.0)))) as before, zipfile.ZipFile(out, "w") as after:
        for info in before.infolist():
            after.writestr(info.filename, pickled if info.filename.endswith("data.pkl") else before.read(info))
    return out.getvalue()


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _pickle_of(value: Any) -> bytes:
    with zipfile.ZipFile(io.BytesIO(_saved(value))) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


class _Runs:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(_trace()),)


def seeds() -> Iterator[bytes]:
    made = folder("resume-made")
    state = {"weights.a": torch.ones(2, 3), "step": 3, "names": ["x"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is one process, as was meant
        dcp.save(state, checkpoint_id=made, no_dist=True)
    yield b"m" + (made / ".metadata").read_bytes()
    yield b"m" + pickle.dumps(_Runs())
    for value in ({"a": [1, 2.5, "x", None, (True,)]}, torch.ones(4), {"n": np.arange(3, dtype=np.uint32)}, _Runs()):
        yield b"p" + _pickle_of(value)
    yield b"a" + _saved({"a": torch.ones(2)})
