"""Where media come from: what they are read from, whether that is allowed, and how much of it may come in."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import urllib.parse
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from aria.media.fetch import fetch
from aria.media.limits import MediaSettings, MemoryReservation, shorten
from aria.workers.cancellation import check_cancelled
from aria.workers.channel import PASSES_FILES
from aria.workers.shared import SharedFile, open_reader

_PIECE = 1 << 18
"""Characters of a data: URI that are unquoted at a time."""
_MAX_HEADER = 1 << 12
"""Characters of a data: URI before its comma."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*(data:|https?://)", re.IGNORECASE)
_BASE64 = re.compile(r";\s*base64\s*(;|$)", re.IGNORECASE)
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
_NAMES = {"image": "picture", "video": "clip", "document": "document"}
_EXAMPLES = {"image": "image/png", "video": "video/mp4", "document": "application/pdf"}


class Base64(NamedTuple):
    """A medium as text, in base64 and without the ``data:`` URI around it."""

    text: str


class OpenedMedia:
    """A medium that was let in.

    Args:
        source: its bytes, or an open file that this object closes.
        name: what errors call it.
        path: of the file.
    """

    def __init__(self, source: bytes | SharedFile, name: str, path: Path | None = None):
        self.source, self.name, self.path = source, name, path
        if isinstance(source, SharedFile):
            weakref.finalize(self, os.close, source.descriptor)

    @property
    def data(self) -> bytes | Path:
        """What it can be opened by again: its bytes, or an absolute path."""
        return self.source if isinstance(self.source, bytes) else self.path or Path()

    def identity(self) -> tuple[object, ...]:
        """Tells it from others: a digest of its bytes, or the file with its size and the time of its last change."""
        if isinstance(self.source, bytes):
            return (hashlib.sha256(self.source).digest(),)
        state = os.fstat(self.source.descriptor)
        return self.path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns

    def file(self) -> BinaryIO:
        """It as a file, open for reading at its beginning; each has a position of its own."""
        return open_reader(self.source)


def open_media(source: Any, kind: str, settings: MediaSettings) -> OpenedMedia:
    """Let a medium in, wherever it is.

    Args:
        source: path (str or Path), bytes, :class:`Base64`, ``data:`` URI (its media type does not matter, the content
            decides), or an ``http://`` or ``https://`` address. White space around a URI or address is ignored.
        kind: "image", "video" or "document".
        settings: limits and permissions.

    Raises:
        FileNotFoundError: no file at the path.
        ValueError: too large, not allowed, or not to be had.
        TypeError: ``source`` is none of these kinds.
    """
    limit: int = getattr(settings, f"{kind}_bytes")
    if isinstance(source, bytes | bytearray | memoryview):
        return OpenedMedia(_within(bytes(source), limit, kind), f"{len(source)} bytes")
    if isinstance(source, Base64):
        return _received(lambda hold: _decode(source.text, 0, True, limit, kind, hold), shorten(source.text), settings)
    if isinstance(source, str) and (_ADDRESS.match(source) or not source.strip()):
        source = source.strip()
    if source == "":
        raise ValueError(f"the address of a {_NAMES[kind]} is empty; expected http(s)://, a data: URI or a path")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _received(lambda hold: _read_data_uri(source, limit, kind, hold), shorten(source), settings)
    if isinstance(source, str) and (scheme := _SCHEME.match(source)):
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(
                f"addresses of kind {scheme[1]}:// are not read ({shorten(source)}); use http://, https:// or a path"
            )
        return _received(lambda hold: fetch(source, limit, settings, hold), shorten(source), settings)
    if isinstance(source, str | os.PathLike):
        path = _check_path(Path(source), kind, settings.local_folders)
        file = _open_file(path, follow=settings.local_folders is None)
        return OpenedMedia(file, repr(str(source)), path)
    kinds = "a PIL picture, an array, a tensor, a path" if kind == "image" else "a path"
    raise TypeError(
        f"a {_NAMES[kind]} cannot be a {type(source).__name__}; pass {kinds}, bytes, a data: URI or an http(s) address"
    )


def _received(receive: Callable[[Callable[[int], None]], bytes], name: str, settings: MediaSettings) -> OpenedMedia:
    """A medium in memory, which is counted there until nobody holds it any more."""
    held = MemoryReservation(settings.decoded_bytes, settings.image_timeout)
    try:
        opened = OpenedMedia(receive(held.grow), name)
    except BaseException:
        held.release()
        raise
    weakref.finalize(opened, held.release)
    return opened


def _check_path(path: Path, kind: str, folders: tuple[Path, ...] | None) -> Path:
    """The absolute path of a file that may be read, without links on its way."""
    try:
        place = path.expanduser().resolve() if folders is None else _inside(path, folders)
        exists = place is not None and place.exists()
        readable = place is not None and place.is_file() and os.access(place, os.R_OK)
    except (OSError, ValueError, RuntimeError) as error:  # far too long, with a null character, links in a circle
        raise ValueError(
            f"{shorten(str(path))} cannot be a path; a {_NAMES[kind]} in base64 begins with "
            f"data:{_EXAMPLES[kind]};base64,"
        ) from error
    if place is None:
        # The same words for what is there and what is not: strangers should not learn which files exist.
        where = "outside the folders that may be read" if folders else "a local path, and none may be read here"
        raise ValueError(f"{shorten(str(path))} is {where}; send a data: URI or an http(s) address")
    if not exists:
        raise FileNotFoundError(f"no {_NAMES[kind]} at {str(path)!r}; check the path")
    if not readable:
        raise ValueError(f"{str(path)!r} is a folder, a device, or closed to this user, not a {_NAMES[kind]}")
    return place


def _open_file(path: Path, *, follow: bool) -> SharedFile:
    """Open a file by a path that was checked. Without ``follow`` there must still be no link on its way: one may have
    been put there in between."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        if not follow and os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW"):
            descriptor = _open_without_links(path, flags)
        else:
            descriptor = os.open(path, flags)
            if not follow and (path.resolve() != path or not os.path.samestat(os.fstat(descriptor), path.stat())):
                os.close(descriptor)
                raise OSError("it was replaced meanwhile")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be opened ({error.strerror or error}); check the path") from error
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        os.close(descriptor)
        raise ValueError(f"{str(path)!r} is a folder or a device, not a file")
    return SharedFile(descriptor, state.st_size, None if PASSES_FILES else str(path))


def _open_without_links(path: Path, flags: int) -> int:
    """The descriptor of a file, opened folder by folder."""
    search = getattr(os, "O_PATH", getattr(os, "O_SEARCH", os.O_RDONLY)) | os.O_DIRECTORY
    folder = os.open(path.anchor, search)
    try:
        for part in path.parts[1:-1]:
            inner = os.open(part, search | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(path.name, flags | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


def _inside(path: Path, folders: tuple[Path, ...]) -> Path | None:
    """The path with all links followed, or None unless it lies in one of the folders."""
    homes = [folder.resolve() for folder in folders]
    # First by its spelling alone: merely looking at a path can reach another machine.
    spelled = Path(os.path.abspath(path))  # noqa: PTH100, resolve() would look
    if not any(spelled.is_relative_to(home) for home in (*homes, *(folder.absolute() for folder in folders))):
        return None
    place = path.resolve()
    return place if any(place.is_relative_to(home) for home in homes) else None


def _unquoted(text: str, start: int) -> Iterator[bytes]:
    """A text from a character on, with ``%41`` and the like put back: in pieces, for all at once takes many times its
    memory."""
    while start < len(text):
        end = min(start + _PIECE, len(text))
        if end < len(text) and (escape := text.rfind("%", end - 2, end)) > start:
            end = escape
        yield urllib.parse.unquote_to_bytes(text[start:end])
        start = end


def _read_data_uri(uri: str, limit: int, kind: str, hold: Callable[[int], None]) -> bytes:
    comma = uri.find(",", 0, _MAX_HEADER)
    if comma < 0:
        raise ValueError(f"{shorten(uri)} is not a data: URI; expected data:{_EXAMPLES[kind]};base64,...")
    coded = _BASE64.search(uri[:comma]) is not None
    return _decode(uri, comma + 1, coded, limit, kind, hold)


def _decode(text: str, start: int, coded: bool, limit: int, kind: str, hold: Callable[[int], None]) -> bytes:
    """What stands in a text from a character on, in base64 or in bytes such as ``%41``: decoded a piece at a time,
    between which other threads run."""
    size = len(text) - start
    # Before anything of it is unpacked. Plain bytes may be three characters each.
    if size > (limit * 4 // 3 + 4 if coded else 3 * limit):
        raise ValueError(f"{shorten(text)} holds more than the {limit:,} bytes allowed for a {_NAMES[kind]}")
    hold(size * 3 // 4 if coded else size)
    pieces = _unquoted(text, start)
    data = io.BytesIO()
    try:
        for piece in _decoded_base64(pieces) if coded else pieces:
            data.write(piece)
    except binascii.Error as error:
        raise ValueError(f"{shorten(text)} is not valid base64: {error}") from error
    if not data.tell():
        raise ValueError(f"{shorten(text)} holds no bytes; expected a file's content in base64, or behind the comma")
    return _within(data.getvalue(), limit, kind)


def _decoded_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """As browsers do it, without padding too; and in the alphabet for addresses."""
    rest, padding = b"", b""
    for piece in pieces:
        check_cancelled()
        text, equals, more = piece.translate(_PLAIN_ALPHABET, b" \t\r\n\f\v").partition(b"=")
        if (padding and text) or more.strip(b"="):
            raise binascii.Error("there is something behind the padding")
        padding += equals
        rest += text
        whole = len(rest) // 4 * 4
        yield base64.b64decode(rest[:whole], validate=True)
        rest = rest[whole:]
    yield base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True)


def _within(data: bytes, limit: int, kind: str) -> bytes:
    if len(data) > limit:
        raise ValueError(f"a {_NAMES[kind]} of {len(data):,} bytes; {limit:,} are allowed")
    return data
