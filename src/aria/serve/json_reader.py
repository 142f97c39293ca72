"""`JsonReader`: JSON read as it arrives, with nothing that keeps the interpreter for long.

CPython's own parser holds the interpreter's lock from the first character to the last, a second or more for a few
hundred megabytes. Here long strings, which are nearly all of such a body, are taken out and decoded a piece at a time
as they arrive, and what is left is parsed by a scanner that lets other threads run.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Generator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from aria.serve.errors import ApiError

PIECE = 1 << 16
"""Bytes that are taken at a time: one or two milliseconds of work."""
MAX_VALUES = 1 << 19
"""In a document, more or less: its commas and opening brackets."""
MAX_CHARACTERS = 4 << 20
"""Of a document without its long strings. Prompts and media are long strings; all else is far smaller."""
MAX_NON_ASCII = 8 << 20
"""Characters of a long string that is not ASCII, far more than any prompt may have: with the first such character all
that came before it changes its width in memory, at once."""
_QUICK = 1 << 19
"""Characters that CPython's own parser reads in a few milliseconds."""
_VALUE_BYTES = 256
"""Of memory for each comma and bracket, once the document is made of Python's objects."""
_RUN, _ESCAPES = 256, 128
_MAX_SHORT = (_RUN + 2) * (_ESCAPES + 1) + 2
# A string is short if it has few escapes, and few characters between them: that is decided in one pass, without going
# back. Whatever comes before the first string that is long or not complete:
_SHORT = re.compile(rf'[^"]*+(?:"[^"\\]{{0,{_RUN}}}+(?:\\.[^"\\]{{0,{_RUN}}}+){{0,{_ESCAPES}}}+"[^"]*+)*+', re.DOTALL)
_INSIDE = re.compile(r'(?:[^"\\]++|\\(?:[^u]|u.{4}))*+', re.DOTALL)
"""Of a string, up to its end or an escape that is not complete."""
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class JsonReader:
    """One document. :meth:`feed` it as it arrives, then :meth:`parse` it, which any thread may do.

    Attributes:
        received: bytes.
    """

    def __init__(self) -> None:
        self._start = b""
        self._decoder: codecs.IncrementalDecoder | None = None
        self.received = 0
        self._parts: list[str] = []
        self._length = 0
        self._values = 0
        self._nbytes = 0
        self._texts: dict[int, str] = {}
        self._cuts: list[tuple[int, int]] = []
        self._splitter = self._split()
        next(self._splitter)

    @property
    def nbytes(self) -> int:
        """Memory that is held."""
        return self._nbytes

    @property
    def parsed_nbytes(self) -> int:
        """Memory that is held from :meth:`parse` on, by the document and its objects; an estimate from above."""
        return self._nbytes + _VALUE_BYTES * min(self._values, MAX_VALUES)

    def feed(self, data: bytes) -> None:
        """Take the next bytes, at most :data:`PIECE` of them.

        Raises:
            ApiError: 400, they are no JSON; 413, it is too large.
        """
        self.received += len(data)
        if self._decoder is None:
            self._start += data
            if len(self._start) < 4:
                return
            self._begin()
            data = self._start
        self._decode(data)

    def parse(self) -> Any:
        """The whole document.

        Raises:
            ApiError: 400, it is no JSON; 413, it has too many values.
        """
        if self._decoder is None:
            self._begin()
            self._decode(self._start)
        self._decode(b"", final=True)
        self._splitter.close()
        try:
            return parse("".join(self._parts), self._texts)
        except json.JSONDecodeError as error:
            place = error.pos + sum(cut for _, cut in self._cuts[: bisect_left(self._cuts, (error.pos, 0))])
            raise _no_json(f"{error.msg} at character {place}") from None
        except TooLargeError as error:
            raise _too_large(f"the body {error}") from None
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply", code="bad_json") from None
        except ValueError as error:  # of JSON's values, only whole numbers have a limit
            message = f"the body has a number that is too long: {str(error).partition(';')[0]}"
            raise ApiError(400, message, code="bad_json") from None

    def _begin(self) -> None:
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(self._start))("surrogatepass")

    def _decode(self, data: bytes, *, final: bool = False) -> None:
        assert self._decoder is not None
        waiting = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            place = self.received - len(data) - waiting + error.start
            message = f"the body is not valid {error.encoding}: {error.reason} at byte {place}"
            raise ApiError(400, message, code="bad_json") from None
        if text:
            self._splitter.send(text)
        if final:
            self._splitter.send("")
        if self._length > MAX_CHARACTERS:
            raise _too_large(f"the body has more than {MAX_CHARACTERS:,} characters beside its long strings")

    def _split(self) -> Generator[None, str, None]:
        """Receives the document piece by piece, and an empty one at its end; takes long strings out."""
        piece, at, offset = "", 0, 0  # `offset` is where the piece begins in the document
        while True:
            end = _SHORT.match(piece, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            self._add(piece[at:end])
            at = end
            if at == len(piece) or (len(piece) - at <= _MAX_SHORT and not _end(piece, at + 1)[1]):
                more = yield
                if not more:
                    self._add(piece[at:])  # of a string that does not end; the parser says so
                    yield
                piece, offset, at = piece[at:] + more, offset + at, 0
                continue
            at += 1
            self._add('"')
            begin, place = offset + at, self._length
            # Python appends in place only to a local variable.
            text, size = "", 0
            while True:
                end, closed = _end(piece, at)
                said = _decoded(piece[at:end], offset + at)
                if not closed and "\ud800" <= said[-1:] <= "\udbff" and said[-1] != piece[end - 1]:
                    # The escape of half a pair; that of the other half may be on its way.
                    said, end = said[:-1], end - 6
                text += said
                if not text.isascii() and len(text) > MAX_NON_ASCII:
                    raise _too_large(
                        f"the body has a string of more than {MAX_NON_ASCII:,} characters that are not ASCII"
                    )
                self._nbytes += sys.getsizeof(text) - size
                size = sys.getsizeof(text)
                at = end
                if closed:
                    break
                more = yield
                if not more:
                    yield
                piece, offset, at = piece[at:] + more, offset + at, 0
            self._texts[place] = text
            self._cuts.append((place, offset + at - begin))
            del text, said
            self._add('"')
            at += 1

    def _add(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._length += len(text)
            self._values += _count(text)
            self._nbytes += 2 * sys.getsizeof(text)  # once more when they are joined


class TooLargeError(ValueError):
    """A document with more values or characters than are read; the message begins with a verb."""


def parse(text: str, texts: Mapping[int, str] | None = None) -> Any:
    """A document of at most :data:`MAX_CHARACTERS` characters. Other threads run meanwhile.

    Args:
        text: JSON.
        texts: strings that stand in it as empty ones, by the index behind their opening quotes. They may not be names.

    Raises:
        TooLargeError: it has too many characters or values.
        ValueError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    if len(text) > MAX_CHARACTERS:
        raise TooLargeError(f"has more than {MAX_CHARACTERS:,} characters")
    # What stands in strings is left out only where it matters.
    if _count(text) > MAX_VALUES and _count(_STRING.sub("", text)) > MAX_VALUES:
        raise TooLargeError(f"has more than {MAX_VALUES:,} commas and brackets, which this server does not take")
    if not texts and len(text) <= _QUICK:
        return json.loads(text)
    return _Decoder(texts or {}).decode(text)


class _Decoder(json.JSONDecoder):
    """Python's own decoder in Python, which has a place to put long strings."""

    def __init__(self, texts: Mapping[int, str]):
        super().__init__()
        left = len(texts)

        def string(document: str, index: int, strict: bool) -> tuple[str, int]:
            nonlocal left
            if index not in texts:
                return scanstring(document, index, strict)
            left -= 1
            return texts[index], index + 1

        self.parse_string = string
        self.scan_once = py_make_scanner(self)
        self._left = lambda: left

    def decode(self, text: str, *args: Any) -> Any:
        value = super().decode(text, *args)
        if self._left():
            raise json.JSONDecodeError(f"Name of more than {_RUN} characters", text, 0)
        return value


def _end(text: str, start: int) -> tuple[int, bool]:
    """Where a string ends whose content begins at ``start``, and whether it does: otherwise it goes on behind ``text``,
    from there."""
    end = text.find('"', start)
    if end < 0:
        end = len(text)
    if text.find("\\", start, end) >= 0:
        end = _INSIDE.match(text, start).end()  # type: ignore[union-attr]
    return end, end < len(text) and text[end] == '"'


def _count(text: str) -> int:
    """Commas and opening brackets."""
    return text.count(",") + text.count("[") + text.count("{")


def _decoded(raw: str, offset: int) -> str:
    """Part of a string without its escapes."""
    try:
        return scanstring(raw + '"', 0, True)[0]
    except json.JSONDecodeError as error:
        raise _no_json(f"{error.msg} at character {offset + error.pos}") from None


def _no_json(message: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {message}", code="bad_json")


def _too_large(message: str) -> ApiError:
    return ApiError(413, message, code="body_too_large")
