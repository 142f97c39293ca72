"""`JsonReader`: incremental JSON parsing that never holds the interpreter lock for long.

CPython's own parser holds the lock from the first character to the last, a second or more for a few hundred megabytes.
Here long strings, which make up nearly all of such a body, are taken out and decoded piece by piece as they arrive, and
the rest is parsed by a scanner that lets other threads run.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from aria.serve.errors import ApiError

PIECE = 1 << 16
"""Bytes processed at a time: one or two milliseconds of work."""
MAX_VALUES = 1 << 19
"""Approximate maximum number of values: counts commas and opening brackets."""
MAX_CHARACTERS = 4 << 20
"""Maximum number of characters besides long strings, which hold prompts and media."""
MAX_NON_ASCII = 8 << 20
"""Maximum number of characters of a non-ASCII string, far more than any prompt has: the first such character widens all
characters before it in memory, at once."""
_QUICK = 1 << 19
"""Number of characters that CPython's own parser reads in a few milliseconds."""
_VALUE_BYTES = 256
"""Estimated memory per comma and bracket once the document is parsed."""
_RUN, _ESCAPES = 256, 128
_MAX_SHORT = (_RUN + 2) * (_ESCAPES + 1) + 2
# A string is short if it has few escapes and few characters between them, which one pass without backtracking decides.
# This matches everything before the first string that is long or incomplete:
_SHORT = re.compile(rf'[^"]*+(?:"[^"\\]{{0,{_RUN}}}+(?:\\.[^"\\]{{0,{_RUN}}}+){{0,{_ESCAPES}}}+"[^"]*+)*+', re.DOTALL)
_INSIDE = re.compile(r'(?:[^"\\]++|\\(?:[^u]|u.{4}))*+', re.DOTALL)
"""The inside of a string, up to its end or an incomplete escape."""
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class JsonReader:
    """A JSON document. :meth:`feed` it as it arrives, then :meth:`parse` it, in any thread.

    Attributes:
        received: Number of bytes received.
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
        """Memory in use, in bytes."""
        return self._nbytes

    @property
    def parsed_nbytes(self) -> int:
        """Upper estimate of the memory in use after :meth:`parse`, for the document and its objects."""
        return self._nbytes + _VALUE_BYTES * min(self._values, MAX_VALUES)

    def feed(self, data: bytes) -> None:
        """Add the next bytes, at most :data:`PIECE`.

        Raises:
            ApiError: 400, not JSON; 413, too large.
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
        """Parse the complete document.

        Raises:
            ApiError: 400, not JSON; 413, too many values.
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
        except ValueError as error:  # only integers have a limit on their length
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
        """Receives the document piece by piece, then an empty piece; takes long strings out."""
        piece, at, offset = "", 0, 0  # `offset` is the position of the piece in the document
        while True:
            end = _SHORT.match(piece, at).end()  # type: ignore[union-attr]  # it also matches the empty string
            self._add(piece[at:end])
            at = end
            if at == len(piece) or (len(piece) - at <= _MAX_SHORT and not _end(piece, at + 1)[1]):
                more = yield
                if not more:
                    self._add(piece[at:])  # of an unterminated string; the parser reports it
                    yield
                piece, offset, at = piece[at:] + more, offset + at, 0
                continue
            at += 1
            self._add('"')
            begin, place = offset + at, self._length
            # Python appends in place to local variables only.
            text, size = "", 0
            while True:
                end, closed = _end(piece, at)
                decoded = _decoded(piece[at:end], offset + at)
                if not closed and "\ud800" <= decoded[-1:] <= "\udbff" and decoded[-1] != piece[end - 1]:
                    # The first half of a surrogate pair; the escape of the second may still arrive.
                    decoded, end = decoded[:-1], end - 6
                text += decoded
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
            del text, decoded
            self._add('"')
            at += 1

    def _add(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._length += len(text)
            self._values += _count(text)
            self._nbytes += 2 * sys.getsizeof(text)  # twice, since they will be joined


class TooLargeError(ValueError):
    """A document with too many values or characters; the message begins with a verb."""


def parse(text: str, texts: Mapping[int, str] | None = None) -> Any:
    """Parse a document of at most :data:`MAX_CHARACTERS` characters, letting other threads run.

    Args:
        text: JSON.
        texts: Strings that are empty in ``text``, by the index after their opening quotes. They cannot be keys.

    Raises:
        TooLargeError: Too many characters or values.
        ValueError: Not JSON.
        RecursionError: Nested too deeply.
    """
    if len(text) > MAX_CHARACTERS:
        raise TooLargeError(f"has more than {MAX_CHARACTERS:,} characters")
    # Commas and brackets inside strings are excluded only if that matters.
    if _count(text) > MAX_VALUES and _count(_STRING.sub("", text)) > MAX_VALUES:
        raise TooLargeError(f"has more than {MAX_VALUES:,} commas and brackets, which this server does not take")
    if not texts and len(text) <= _QUICK:
        return json.loads(text)
    return _Decoder(texts or {}).decode(text)


class _Decoder(json.JSONDecoder):
    """The standard library's decoder in pure Python, which inserts the long strings."""

    def __init__(self, texts: Mapping[int, str]):
        super().__init__()
        left = len(texts)

        def string(document: str, index: int, strict: bool) -> tuple[str, int]:
            nonlocal left
            if index not in texts:
                found: tuple[str, int] = scanstring(document, index, strict)
                return found
            left -= 1
            return texts[index], index + 1

        self.parse_string = string
        self.scan_once = py_make_scanner(self)
        self._left: Callable[[], int] = lambda: left

    def decode(self, text: str, *args: Any) -> Any:
        value = super().decode(text, *args)
        if self._left():
            raise json.JSONDecodeError(f"Name of more than {_RUN} characters", text, 0)
        return value


def _end(text: str, start: int) -> tuple[int, bool]:
    """The end of a string whose content begins at ``start``, and whether it is complete; otherwise it continues after
    ``text``, from there."""
    end = text.find('"', start)
    if end < 0:
        end = len(text)
    if text.find("\\", start, end) >= 0:
        end = _INSIDE.match(text, start).end()  # type: ignore[union-attr]
    return end, end < len(text) and text[end] == '"'


def _count(text: str) -> int:
    """Number of commas and opening brackets."""
    return text.count(",") + text.count("[") + text.count("{")


def _decoded(raw: str, offset: int) -> str:
    """Decode the escapes of part of a string."""
    try:
        text: str = scanstring(raw + '"', 0, True)[0]
        return text
    except json.JSONDecodeError as error:
        raise _no_json(f"{error.msg} at character {offset + error.pos}") from None


def _no_json(message: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {message}", code="bad_json")


def _too_large(message: str) -> ApiError:
    return ApiError(413, message, code="body_too_large")
