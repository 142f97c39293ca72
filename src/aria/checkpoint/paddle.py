"""PaddlePaddle's ``model_state.pdparams``: a pickle of NumPy arrays, read without unpickling.

The bytes of arrays are skipped and their offsets recorded: the published file is 47 GB, and only one piece at a time
needs to be in memory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from aria.checkpoint.pickles import Calls, Machine, PickledText, Place, RefusedError
from aria.checkpoint.stored import Segment, StoredTensor

# Paddle stores bfloat16 as uint16, without any mark in the file.
_DTYPES = {"u2": torch.bfloat16, "f2": torch.float16, "f4": torch.float32, "f8": torch.float64}

_NAMES = "StructuredToParameterName@@"
_SLICES = "UnpackBigParamInfor@@"
"""Protocols 2 and 3 split big arrays; this entry lists the keys of their parts."""

_MOST_STEPS = 2_000_000
"""An array takes about 40, and a model has 6,000 arrays."""
_MOST_AXES = 8


class _DType:
    """Stand-in for ``numpy.dtype``."""

    def __init__(self, code: str):
        self.code = code

    def set_state(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", "="):
            raise RefusedError(f"an array of byte order {state[1]!r:.40}; only little-endian ones are known")


class _Array:
    """Stand-in for ``numpy.ndarray``."""

    shape: tuple[int, ...]
    dtype: _DType
    data: Place | None = None

    def set_state(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if fortran:
            raise RefusedError("a column-major array; save it again from row-major ones (numpy.ascontiguousarray)")
        if not (isinstance(dtype, _DType) and isinstance(data, Place) and isinstance(shape, tuple)):
            raise RefusedError("an array whose state is not shape, dtype and bytes")
        self.shape, self.dtype, self.data = _shape(shape), dtype, data

    def stored(self, key: str, file: Path) -> StoredTensor:
        if self.data is None:
            raise RefusedError(f"{key:.100} without its shape, dtype and bytes")
        dtype = _DTYPES.get(self.dtype.code)
        if dtype is None:
            raise RefusedError(f"{key:.100} as numpy {self.dtype.code!r:.40}; expected one of {', '.join(_DTYPES)}")
        tensor = StoredTensor(dtype, self.shape, (Segment(file, self.data.offset, self.data.nbytes, self.data.text),))
        # In a string a byte takes one or two.
        if not tensor.nbytes <= self.data.nbytes <= tensor.nbytes * (2 if self.data.text else 1):
            came = f"{list(self.shape)} with {self.data.nbytes} bytes"
            raise RefusedError(f"{key:.100} of shape {came}, not {tensor.nbytes}")
        return tensor


def _encode(text: Any, encoding: Any) -> Place:
    place = text.place if isinstance(text, PickledText) else text
    if not isinstance(place, Place) or encoding != "latin1" or not place.text:
        raise RefusedError(f"bytes in the encoding {encoding!r:.40}")
    return place


def _tuple(items: Any) -> tuple[Any, ...]:
    if not isinstance(items, tuple):
        raise RefusedError("a tuple made of something else")
    return items


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list | tuple):
        raise RefusedError("a shape that is no list of sizes")
    if len(sizes) > _MOST_AXES or not all(isinstance(size, int) and 0 <= size < 1 << 48 for size in sizes):
        raise RefusedError(f"an array of shape {sizes!r:.100}")
    return tuple(sizes)


def _new_dtype(code: Any, *_: Any) -> _DType:
    if not isinstance(code, str):
        raise RefusedError("an array of a dtype without a name")
    return _DType(str(code))


_CALLS: Calls = {
    "numpy.core.multiarray._reconstruct": lambda kind, shape, code: _Array(),
    "numpy._core.multiarray._reconstruct": lambda kind, shape, code: _Array(),
    "numpy.dtype": _new_dtype,
    "_codecs.encode": _encode,
    "numpy.ndarray": None,  # handed to _reconstruct
    "builtins.tuple": _tuple,
    "__builtin__.tuple": _tuple,
    "collections.OrderedDict": lambda: {},
}
"""Stand-ins for the names in a file."""


def read_pdparams(file: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of a ``.pdparams`` file. Nothing in it is executed, and no array is read.

    Args:
        file: A state dictionary from ``paddle.save`` (pickle protocol 2, 3 or 4): arrays by name, or pairs of an
            internal name and an array.

    Raises:
        ValueError: The file is truncated or corrupt, or holds anything but floating-point arrays.
    """
    try:
        with file.open("rb") as opened:
            return _tensors(Machine(opened, _CALLS, _MOST_STEPS).run(), file)
    except ValueError as error:
        has = "it has " if isinstance(error, RefusedError) else ""
        raise ValueError(f"{file} is not a PaddlePaddle checkpoint that can be read: {has}{error}") from error


def _tensors(content: Any, file: Path) -> dict[str, StoredTensor]:
    if not isinstance(content, dict):
        raise RefusedError(f"a {type(content).__name__.strip('_')} at its top, not a dictionary of arrays")
    content.pop(_NAMES, None)
    slices = content.pop(_SLICES, {})
    tensors: dict[str, StoredTensor] = {}
    for key, value in content.items():
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]
        if not isinstance(value, _Array):
            raise RefusedError(f"{key:.100} that is not an array")
        tensors[key] = value.stored(key, file)
    if not isinstance(slices, dict) or not all(isinstance(info, dict) for info in slices.values()):
        raise RefusedError("slices that are not listed by name")
    for key, info in slices.items():
        names, shape = info.get("slices"), _shape(info.get("OriginShape", ()))
        names = names if isinstance(names, list) else []
        parts = [tensors.pop(name) for name in names if isinstance(name, str) and name in tensors]
        if len(parts) < max(len(names), 1) or math.prod(shape) != sum(math.prod(part.shape) for part in parts):
            raise RefusedError(f"slices of {key:.100} that do not add up to its shape {list(shape)}")
        segments = tuple(segment for part in parts for segment in part.segments)
        tensors[key] = StoredTensor(parts[0].dtype, shape, segments)
    return tensors
