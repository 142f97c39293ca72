"""PaddlePaddle's ``model_state.pdparams``: a pickle of numpy arrays, read without unpickling it.

A pickle is a program for a small stack machine. The one here knows only what dictionaries of arrays need; it has no way
to import or call anything, so that nothing in a file can run. It steps over the arrays' bytes and notes where they are:
the published file is 47 GB, and no more than one piece of it need be in memory.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from aria.checkpoint.stored import Segment, StoredTensor

# Paddle keeps bfloat16 as the bits of uint16; nothing in the file says so.
_DTYPES = {"u2": torch.bfloat16, "f2": torch.float16, "f4": torch.float32, "f8": torch.float64}

_NAMES = "StructuredToParameterName@@"
_SLICES = "UnpackBigParamInfor@@"
"""Protocols 2 and 3 cut big arrays; this entry says from which keys to put them together again."""

_LONG_TEXT = 1 << 16
_OPCODES = {opcode.code: opcode.name for opcode in pickletools.opcodes}


class _RefusedError(ValueError):
    """The file asks for something other than arrays."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or function that the file names. It is only ever compared, never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Bytes left in the file."""

    offset: int
    nbytes: int
    text: bool = False


class _Text(str):
    """A string that knows where it was, because protocol 2 writes the bytes of arrays as text."""

    place: _Bytes


class _DType:
    """What becomes of ``numpy.dtype``."""

    def __init__(self, code: str):
        self.code = code

    def set_state(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", "="):
            raise _RefusedError(f"an array of byte order {state[1]!r}; only little-endian ones are known")


class _Array:
    """What becomes of ``numpy.ndarray``."""

    shape: tuple[int, ...]
    dtype: _DType
    data: _Bytes

    def set_state(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if fortran:
            raise _RefusedError("a column-major array; save it again from row-major ones (numpy.ascontiguousarray)")
        if not (isinstance(dtype, _DType) and isinstance(data, _Bytes) and isinstance(shape, tuple)):
            raise _RefusedError("an array whose state is not shape, dtype and bytes")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise _RefusedError(f"an array of shape {shape!r}")
        self.shape, self.dtype, self.data = shape, dtype, data

    def stored(self, key: str, file: Path) -> StoredTensor:
        dtype = _DTYPES.get(self.dtype.code)
        if dtype is None:
            raise _RefusedError(f"{key} as numpy {self.dtype.code!r}; expected one of {', '.join(_DTYPES)}")
        tensor = StoredTensor(dtype, self.shape, (Segment(file, self.data.offset, self.data.nbytes, self.data.text),))
        # As text a byte takes one or two.
        if not tensor.nbytes <= self.data.nbytes <= tensor.nbytes * (2 if self.data.text else 1):
            raise _RefusedError(f"{key} of shape {list(self.shape)} with {self.data.nbytes} bytes, not {tensor.nbytes}")
        return tensor


def _encode(text: Any, encoding: Any) -> _Bytes:
    place = text if isinstance(text, _Bytes) else text.place
    if encoding != "latin1" or not place.text:
        raise _RefusedError(f"bytes in the encoding {encoding!r}")
    return place


def _new_dtype(code: Any, *_: Any) -> _DType:
    if not isinstance(code, str):
        raise _RefusedError("an array of a dtype without a name")
    return _DType(str(code))


_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": lambda kind, shape, code: _Array(),
    "numpy._core.multiarray._reconstruct": lambda kind, shape, code: _Array(),
    "numpy.dtype": _new_dtype,
    "_codecs.encode": _encode,
    "builtins.tuple": tuple,
    "__builtin__.tuple": tuple,
    "collections.OrderedDict": dict,
}
"""What the known globals mean here; ``numpy.ndarray`` is only handed to ``_reconstruct``."""

_MARK = _Global("(mark)")


class _Machine:
    """Steps through one pickle."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if self.take(1) != pickle.PROTO or self.take(1)[0] not in (2, 3, 4):
            raise _RefusedError(
                "a beginning that is not that of a pickle of protocol 2, 3 or 4, which paddle.save writes"
            )
        while (code := self.take(1)) != pickle.STOP:
            step = _STEPS.get(code)
            if step is None:
                raise _RefusedError(f"the pickle operation {_OPCODES.get(code.decode('latin1'), code)}")
            step(self)
        return self.stack.pop()

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise _RefusedError("an end before its contents are complete; fetch it again")
        return data

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def leave(self, nbytes: int, *, text: bool = False) -> _Bytes:
        """Step over bytes and say where they are."""
        place = _Bytes(self.file.tell(), nbytes, text)
        if place.offset + nbytes > self.size:
            raise _RefusedError("an end before its contents are complete; fetch it again")
        self.file.seek(nbytes, os.SEEK_CUR)
        return place

    def push_bytes(self, form: str) -> None:
        self.stack.append(self.leave(self.number(form)))

    def push_text(self, form: str) -> None:
        place = self.leave(self.number(form), text=True)
        if place.nbytes > _LONG_TEXT:
            self.stack.append(place)
            return
        self.file.seek(place.offset)
        text = _Text(self.take(place.nbytes).decode("utf-8"))
        text.place = place
        self.stack.append(text)

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise _RefusedError("operations out of order")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def push_tuple(self, count: int) -> None:
        items = tuple(self.stack.pop() for _ in range(count))
        self.stack.append(items[::-1])

    def push_global(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in _CALLS and full != "numpy.ndarray":
            raise _RefusedError(f"a call of {full!r}, which a file of arrays has no need of; nothing was run")
        self.stack.append(_Global(full))

    def line(self) -> str:
        return self.file.readline(256).decode("utf-8").rstrip("\n")

    def reduce(self) -> None:
        function, arguments = self.push_pair()
        if not isinstance(function, _Global) or function.name not in _CALLS:
            raise _RefusedError("a call of something that is not a function")
        self.stack.append(_CALLS[function.name](*arguments))

    def push_pair(self) -> tuple[Any, Any]:
        second = self.stack.pop()
        return self.stack.pop(), second

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _DType) or not isinstance(state, tuple):
            raise _RefusedError("a state for something that is not an array")
        self.stack[-1].set_state(state)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict) or not isinstance(key, str):
                raise _RefusedError("an entry that has no name")
            target[str(key)] = value

    def append_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _RefusedError("operations out of order")
        self.stack[-1].extend(items)

    def push_integer(self, length_form: str) -> None:
        self.stack.append(pickle.decode_long(self.take(min(self.number(length_form), 64))))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.FRAME: lambda m: m.take(8),
    pickle.MARK: lambda m: m.stack.append(_MARK),
    pickle.NONE: lambda m: m.stack.append(None),
    pickle.NEWTRUE: lambda m: m.stack.append(True),
    pickle.NEWFALSE: lambda m: m.stack.append(False),
    pickle.BININT: lambda m: m.stack.append(m.number("<i")),
    pickle.BININT1: lambda m: m.stack.append(m.number("<B")),
    pickle.BININT2: lambda m: m.stack.append(m.number("<H")),
    pickle.LONG1: lambda m: m.push_integer("<B"),
    pickle.BINUNICODE: lambda m: m.push_text("<I"),
    pickle.SHORT_BINUNICODE: lambda m: m.push_text("<B"),
    pickle.BINUNICODE8: lambda m: m.push_text("<Q"),
    pickle.BINBYTES: lambda m: m.push_bytes("<I"),
    pickle.SHORT_BINBYTES: lambda m: m.push_bytes("<B"),
    pickle.BINBYTES8: lambda m: m.push_bytes("<Q"),
    pickle.EMPTY_DICT: lambda m: m.stack.append({}),
    pickle.EMPTY_LIST: lambda m: m.stack.append([]),
    pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
    pickle.TUPLE: lambda m: m.stack.append(tuple(m.since_mark())),
    pickle.TUPLE1: lambda m: m.push_tuple(1),
    pickle.TUPLE2: lambda m: m.push_tuple(2),
    pickle.TUPLE3: lambda m: m.push_tuple(3),
    pickle.SETITEM: lambda m: m.set_items(list(m.push_pair())),
    pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
    pickle.APPEND: lambda m: m.append_items([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.append_items(m.since_mark()),
    pickle.BINPUT: lambda m: m.memoize(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.memoize(m.number("<I")),
    pickle.MEMOIZE: lambda m: m.memoize(len(m.memo)),
    pickle.BINGET: lambda m: m.stack.append(m.memo[m.number("<B")]),
    pickle.LONG_BINGET: lambda m: m.stack.append(m.memo[m.number("<I")]),
    pickle.GLOBAL: lambda m: m.push_global(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.push_global(*m.push_pair()),
    pickle.REDUCE: lambda m: m.reduce(),
    pickle.BUILD: lambda m: m.build(),
}


def read_pdparams(file: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a ``.pdparams`` file are. Nothing in the file is executed, and no array is read.

    Args:
        file: what ``paddle.save`` wrote of a state dictionary (pickle protocol 2, 3 or 4): arrays by name, or pairs of
            an internal name and an array.

    Raises:
        ValueError: the file is cut off or corrupt, or holds anything but floating-point arrays.
    """
    try:
        with file.open("rb") as opened:
            content = _Machine(opened, os.fstat(opened.fileno()).st_size).run()
        return _tensors(content, file)
    except _RefusedError as error:
        raise ValueError(f"{file} is not a PaddlePaddle checkpoint that can be read: it has {error}") from error
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
        # What wrong operands come to; the machine has no side effects that this could hide.
        raise ValueError(
            f"{file} is not a PaddlePaddle checkpoint that can be read: it is corrupt ({error})"
        ) from error


def _tensors(content: Any, file: Path) -> dict[str, StoredTensor]:
    if not isinstance(content, dict):
        raise _RefusedError(f"a {type(content).__name__.strip('_')} at its top, not a dictionary of arrays")
    content.pop(_NAMES, None)
    slices = content.pop(_SLICES, {})
    tensors = {}
    for key, value in content.items():
        if isinstance(value, tuple) and len(value) == 2:
            value = value[1]
        if not isinstance(value, _Array):
            raise _RefusedError(f"{key} that is not an array")
        tensors[key] = value.stored(key, file)
    for key, info in slices.items():
        parts = [tensors.pop(part) for part in info["slices"]]
        shape = tuple(info["OriginShape"])
        if math.prod(shape) != sum(math.prod(part.shape) for part in parts):
            raise _RefusedError(f"slices of {key} that do not add up to its shape {list(shape)}")
        segments = tuple(segment for part in parts for segment in part.segments)
        tensors[key] = StoredTensor(parts[0].dtype, shape, segments)
    return tensors
