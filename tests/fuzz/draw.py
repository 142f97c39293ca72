"""Make structured values from input bytes, so that fuzzing bytes explores messages, schemas and bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

ODD_TEXTS = ("", "\x00", "\ud800", "é", "💥", "\u2581", "\ufdd0", " ", "\n", '"', "\\", "a" * 300, "{", "</tool_call>")
ODD_NUMBERS = (0, -1, 1, 2, 255, 2**31, 2**53, 2**53 + 1, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 5e-324)


class Draw:
    """Takes bytes from the front; an input that is used up gives zeros, which always choose the first and the least."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        """Whether bytes are left."""
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def below(self, limit: int) -> int:
        """A whole number from 0 up to ``limit``, which it does not reach."""
        value, span = self.byte(), 256
        while span < limit:
            value, span = value << 8 | self.byte(), span << 8
        return value % limit

    def one(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def flag(self) -> bool:
        return bool(self.byte() & 1)

    def bytes(self, count: int) -> bytes:
        """At most ``count`` of those that are left."""
        part = self._data[self._at : self._at + count]
        self._at += len(part)
        return part

    def rest(self) -> bytes:
        return self.bytes(len(self._data))

    def text(self, words: Sequence[str] = (), pieces: int = 6) -> str:
        """A few words and odd characters one after the other."""
        parts: list[str] = []
        for _ in range(self.below(pieces + 1)):
            kind = self.byte() % 4
            if kind == 0 and words:
                parts.append(self.one(words))
            elif kind == 1:
                parts.append(self.one(ODD_TEXTS))
            elif kind == 2 and words:  # a part of a word
                word = self.one(words)
                start = self.below(len(word) + 1)
                parts.append(word[start : start + self.below(len(word) + 1)])
            else:
                parts.append(self.bytes(self.below(8)).decode("latin-1"))
        return "".join(parts)

    def number(self) -> float:
        return self.one(ODD_NUMBERS) if self.flag() else self.below(1 << 16) - (1 << 15)

    def json(self, words: Sequence[str] = (), depth: int = 4) -> Any:
        """Any value of JSON, and some that only Python takes for one."""
        kind = self.below(8 if depth else 6)
        if kind == 6:
            return [self.json(words, depth - 1) for _ in range(self.below(4))]
        if kind == 7:
            return {self.text(words, 2): self.json(words, depth - 1) for _ in range(self.below(4))}
        match kind:
            case 3:
                return self.number()
            case 4:
                return self.text(words)
            case 5:
                return self.one(words or ODD_TEXTS)
        return (None, True, False)[kind]


def spoiled(draw: Draw, value: Any, words: Sequence[str] = ()) -> Any:
    """JSON with a few of its values replaced, dropped or added to."""
    holder = {"": value}
    for _ in range(1 + draw.below(3)):
        places = [(holder, "")]
        for parent, key in places:
            child = parent[key]
            if isinstance(child, dict):
                places += [(child, name) for name in child]
            elif isinstance(child, list):
                places += [(child, index) for index in range(len(child))]
        parent, key = draw.one(places)
        match draw.below(4):
            case 0:
                parent[key] = draw.json(words)
            case 1 if parent is not holder:
                del parent[key]
            case 2 if isinstance(parent[key], dict):
                parent[key][draw.text(words, 2)] = draw.json(words)
            case 3 if isinstance(parent[key], list):
                parent[key].append(draw.json(words))
    return holder[""]
