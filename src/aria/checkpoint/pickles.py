"""Reading untrusted pickles without unpickling them.

A pickle is a program for a small stack machine. This one implements only what plain containers, arrays and records
need, and cannot import or call anything, so that nothing in a file can run. Names of classes and functions are looked
up in a table of the caller; other names are an error.
"""

from __future__ import annotations

import os
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

_CUT = "an end before its contents are complete; fetch it again"
_LONG_TEXT = 1 << 16
_MOST_TEXT = 64 << 20
"""Maximum bytes of all strings."""
_MOST_INTEGER = 9
"""Maximum bytes of an integer: 8, and one for its sign."""
_OPCODES = {opcode.code: opcode.name for opcode in pickletools.opcodes}


class RefusedError(ValueError):
    """The pickle needs something unsupported; the message continues "it has"."""


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function named in the pickle. It is compared, never imported."""

    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes that stay in the file."""

    offset: int
    nbytes: int
    text: bool = False


class PickledText(str):
    """A string with its position in the file, because protocol 2 writes the bytes of arrays as strings."""

    place: Place


class Record:
    """Stand-in for an object with attributes, which the caller checks."""

    def __init__(self, kind: str):
        self.kind = kind
        self.state: Any = {}

    def set_state(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


_MARK = Named("(mark)")

Calls = Mapping[str, Callable[..., Any] | None]
"""Names that a pickle may use -> the function called in their place; None: the name may not be called."""


class Machine:
    """Runs one pickle.

    Args:
        file: File to read from its current position.
        calls: The known names. Functions must not copy their arguments: a few bytes of a pickle can repeat a call many
            times.
        most_steps: Maximum operations, each of which may take a hundred bytes of memory.
    """

    def __init__(self, file: BinaryIO, calls: Calls, most_steps: int):
        self.file, self.calls, self.most_steps = file, calls, most_steps
        self.size = os.fstat(file.fileno()).st_size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._text = 0

    def run(self) -> Any:
        """The value of the pickle.

        Raises:
            RefusedError: It needs something unsupported.
            ValueError: It is truncated or corrupt.
        """
        try:
            return self._run()
        except RefusedError:
            raise
        except (
            IndexError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError
        ) as error:  # fmt: skip
            # Errors of wrong operands; the machine has no side effects that this could hide.
            raise ValueError(f"it is corrupt ({error})") from error

    def _run(self) -> Any:
        if self.take(1) != pickle.PROTO or self.take(1)[0] not in (2, 3, 4, 5):
            raise RefusedError("a beginning that is not that of a pickle of protocol 2 to 5")
        read, steps = self.file.read, _STEPS  # a large training has millions
        for _ in range(self.most_steps):
            code = read(1)
            step = steps.get(code)
            if step is None:
                if code == pickle.STOP:
                    return self.stack.pop()
                if not code:
                    raise RefusedError(_CUT)
                raise RefusedError(f"the pickle operation {_OPCODES.get(code.decode('latin1'), code)}")
            step(self)
        raise RefusedError(f"more than {self.most_steps:,} operations, which no file of its kind needs")

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise RefusedError(_CUT)
        return data

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def leave(self, nbytes: int, *, text: bool = False) -> Place:
        """Skip bytes and return their position."""
        place = Place(self.file.tell(), nbytes, text)
        if place.offset + nbytes > self.size:
            raise RefusedError(_CUT)
        self.file.seek(nbytes, os.SEEK_CUR)
        return place

    def push_bytes(self, size: int) -> None:
        self.stack.append(self.leave(self.number(size)))

    def push_text(self, size: int) -> None:
        nbytes = self.number(size)
        if nbytes > _LONG_TEXT:
            self.stack.append(self.leave(nbytes, text=True))
            return
        self._text += nbytes
        if self._text > _MOST_TEXT:
            raise RefusedError(f"names of more than {_MOST_TEXT:,} bytes")
        offset = self.file.tell()
        text = PickledText(self.take(nbytes).decode("utf-8"))
        text.place = Place(offset, nbytes, True)
        self.stack.append(text)

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise RefusedError("operations out of order")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise RefusedError("operations out of order")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def push_name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise RefusedError("operations out of order")
        full = f"{module}.{name}"
        if full not in self.calls:
            raise RefusedError(f"a call of {full!r:.100}, which a file of its kind has no need of; nothing was run")
        self.stack.append(Named(full))

    def line(self) -> str:
        return self.file.readline(256).decode("utf-8").rstrip("\n")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        known = self.calls.get(function.name) if isinstance(function, Named) else None
        if known is None or not isinstance(arguments, tuple):
            raise RefusedError("a call of something that is not a function")
        self.stack.append(known(*arguments))

    def build(self) -> None:
        state = self.stack.pop()
        if not hasattr(self.stack[-1], "set_state"):
            raise RefusedError("a state for something that has none")
        self.stack[-1].set_state(state)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples in tuples would take any depth to hash.
            if not isinstance(target, dict) or not isinstance(key, str | Record):
                raise RefusedError("an entry that has no name")
            target[str(key) if isinstance(key, str) else key] = value

    def append_items(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise RefusedError("operations out of order")
        self.stack[-1].extend(items)

    def push_integer(self) -> None:
        nbytes = self.number(1)
        if nbytes > _MOST_INTEGER:
            raise RefusedError(f"a whole number of {nbytes} bytes")
        self.stack.append(pickle.decode_long(self.take(nbytes)))

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


_STEPS: dict[bytes, Callable[[Machine], Any]] = {
    pickle.FRAME: lambda m: m.take(8),
    pickle.MARK: lambda m: m.stack.append(_MARK),
    pickle.NONE: lambda m: m.stack.append(None),
    pickle.NEWTRUE: lambda m: m.stack.append(True),
    pickle.NEWFALSE: lambda m: m.stack.append(False),
    pickle.BININT: lambda m: m.stack.append(int.from_bytes(m.take(4), "little", signed=True)),
    pickle.BININT1: lambda m: m.stack.append(m.number(1)),
    pickle.BININT2: lambda m: m.stack.append(m.number(2)),
    pickle.LONG1: lambda m: m.push_integer(),
    pickle.BINUNICODE: lambda m: m.push_text(4),
    pickle.SHORT_BINUNICODE: lambda m: m.push_text(1),
    pickle.BINUNICODE8: lambda m: m.push_text(8),
    pickle.BINBYTES: lambda m: m.push_bytes(4),
    pickle.SHORT_BINBYTES: lambda m: m.push_bytes(1),
    pickle.BINBYTES8: lambda m: m.push_bytes(8),
    pickle.EMPTY_DICT: lambda m: m.stack.append({}),
    pickle.EMPTY_LIST: lambda m: m.stack.append([]),
    pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
    pickle.TUPLE: lambda m: m.stack.append(tuple(m.since_mark())),
    pickle.TUPLE1: lambda m: m.push_tuple(1),
    pickle.TUPLE2: lambda m: m.push_tuple(2),
    pickle.TUPLE3: lambda m: m.push_tuple(3),
    pickle.SETITEM: lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
    pickle.APPEND: lambda m: m.append_items([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.append_items(m.since_mark()),
    pickle.BINPUT: lambda m: m.memoize(m.number(1)),
    pickle.LONG_BINPUT: lambda m: m.memoize(m.number(4)),
    pickle.MEMOIZE: lambda m: m.memoize(len(m.memo)),
    pickle.BINGET: lambda m: m.stack.append(m.memo[m.number(1)]),
    pickle.LONG_BINGET: lambda m: m.stack.append(m.memo[m.number(4)]),
    pickle.GLOBAL: lambda m: m.push_name(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.push_name(*[m.stack.pop(), m.stack.pop()][::-1]),
    pickle.REDUCE: lambda m: m.call(),
    pickle.NEWOBJ: lambda m: m.call(),
    pickle.BUILD: lambda m: m.build(),
}
