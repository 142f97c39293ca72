"""Open media from paths, bytes, data: URIs and http(s) addresses, within the limits and permissions of the settings."""

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

from aria.media.budgets import MemoryReservation
from aria.media.fetch import fetch
from aria.media.limits import MediaSettings, shorten
from aria.workers.cancellation import check_cancelled
from aria.workers.channel import PASSES_FILES
from aria.workers.shared import SharedFile, open_reader

_CHUNK = 1 << 18
"""Characters of a data: URI to unquote at a time."""
_MAX_HEADER = 1 << 12
"""Maximum number of characters before the comma of a data: URI."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*(data:|https?://)", re.IGNORECASE)
_BASE64 = re.compile(r";\s*base64\s*(;|$)", re.IGNORECASE)
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
_NAMES = {"image": "an image", "video": "a clip", "document": "a document"}
_EXAMPLES = {"image": "image/png", "video": "video/mp4", "document": "application/pdf"}


class Base64(NamedTuple):
    """A media file in base64, without the ``data:`` URI around it."""

    text: str


class OpenedMedia:
    """A media file that passed the checks of :func:`open_media`.

    Args:
        source: The bytes, or an open file that this object closes.
        name: Name for error messages.
        path: Path of the file, if there is one.
    """

    def __init__(self, source: bytes | SharedFile, name: str, path: Path | None = None):
        self.source, self.name, self.path = source, name, path
        if isinstance(source, SharedFile):
            weakref.finalize(self, os.close, source.descriptor)

    @property
    def data(self) -> bytes | Path:
        """The bytes, or an absolute path: what the file can be opened from again."""
        return self.source if isinstance(self.source, bytes) else self.path or Path()

    def identity(self) -> tuple[object, ...]:
        """A cache key: a digest of the bytes, or the path with inode, size and modification time."""
        if isinstance(self.source, bytes):
            return (hashlib.sha256(self.source).digest(),)
        state = os.fstat(self.source.descriptor)
        return self.path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns

    def file(self) -> BinaryIO:
        """A new binary file object at position 0. Each call returns one with its own position."""
        return open_reader(self.source)


def open_media(source: Any, kind: str, settings: MediaSettings) -> OpenedMedia:
    """Open a media file, checking permissions and size.

    Args:
        source: A path (str or Path), bytes, :class:`Base64`, a ``data:`` URI (its media type is ignored: the content
            decides), or an ``http://`` or ``https://`` address. White space around a URI or address is ignored.
        kind: "image", "video" or "document".
        settings: Limits and permissions.

    Raises:
        FileNotFoundError: There is no file at the path.
        ValueError: The file is too large, not allowed, or cannot be read or fetched.
        TypeError: ``source`` has an unsupported type.
    """
    limit: int = getattr(settings, f"{kind}_bytes")
    if isinstance(source, bytes | bytearray | memoryview):
        return OpenedMedia(_check_size(bytes(source), limit, kind), f"{len(source)} bytes")
    if isinstance(source, Base64):
        return _receive(lambda hold: _decode(source.text, 0, True, limit, kind, hold), shorten(source.text), settings)
    if isinstance(source, str) and (_ADDRESS.match(source) or not source.strip()):
        source = source.strip()
    if source == "":
        raise ValueError(f"the address of {_NAMES[kind]} is empty; expected http(s)://, a data: URI or a path")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _receive(lambda hold: _read_data_uri(source, limit, kind, hold), shorten(source), settings)
    if isinstance(source, str) and (scheme := _SCHEME.match(source)):
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(
                f"{scheme[1]}:// addresses are not supported ({shorten(source)}); use http://, https:// or a path"
            )
        return _receive(lambda hold: fetch(source, limit, settings, hold), shorten(source), settings)
    if isinstance(source, str | os.PathLike):
        path = _check_path(Path(source), kind, settings.local_folders)
        file = _open_file(path, follow=settings.local_folders is None)
        return OpenedMedia(file, repr(str(source)), path)
    kinds = "a PIL image, an array, a tensor, a path" if kind == "image" else "a path"
    raise TypeError(
        f"{_NAMES[kind]} cannot be a {type(source).__name__}; pass {kinds}, bytes, a data: URI or an http(s) address"
    )


def _receive(receive: Callable[[Callable[[int], None]], bytes], name: str, settings: MediaSettings) -> OpenedMedia:
    """Load a media file into memory and keep its memory reserved until the result is garbage-collected."""
    held = MemoryReservation(settings.decoded_bytes, settings.image_timeout)
    try:
        opened = OpenedMedia(receive(held.grow), name)
    except BaseException:
        held.release()
        raise
    weakref.finalize(opened, held.release)
    return opened


def _check_path(path: Path, kind: str, folders: tuple[Path, ...] | None) -> Path:
    """Return the absolute path of a readable file, with symbolic links resolved."""
    try:
        place = path.expanduser().resolve() if folders is None else _resolve_inside(path, folders)
        exists = place is not None and place.exists()
        readable = place is not None and place.is_file() and os.access(place, os.R_OK)
    except (OSError, ValueError, RuntimeError) as error:  # far too long, with a null character, links in a circle
        raise ValueError(
            f"{shorten(str(path))} cannot be a path; {_NAMES[kind]} in base64 begins with "
            f"data:{_EXAMPLES[kind]};base64,"
        ) from error
    if place is None:
        # The message is the same whether or not the file exists, so that clients cannot probe for files.
        where = "outside the allowed folders" if folders else "a local path, and local files are not allowed here"
        raise ValueError(f"{shorten(str(path))} is {where}; send a data: URI or an http(s) address")
    if not exists:
        raise FileNotFoundError(f"no {kind} at {str(path)!r}; check the path")
    if not readable:
        raise ValueError(f"{str(path)!r} is a folder, a device, or not readable by this user, not {_NAMES[kind]}")
    return place


def _open_file(path: Path, *, follow: bool) -> SharedFile:
    """Open a file by a checked path.

    Without ``follow``, the path must still be free of symbolic links: one may have been created since the check.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        if not follow and os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW"):
            descriptor = _open_without_links(path, flags)
        else:
            descriptor = os.open(path, flags)
            if not follow and (path.resolve() != path or not os.path.samestat(os.fstat(descriptor), path.stat())):
                os.close(descriptor)
                raise OSError("it was replaced in the meantime")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be opened ({error.strerror or error}); check the path") from error
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        os.close(descriptor)
        raise ValueError(f"{str(path)!r} is a folder or a device, not a file")
    return SharedFile(descriptor, state.st_size, None if PASSES_FILES else str(path))


def _open_without_links(path: Path, flags: int) -> int:
    """Open a file folder by folder and return its descriptor."""
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


def _resolve_inside(path: Path, folders: tuple[Path, ...]) -> Path | None:
    """Resolve all links of a path; None if the result is not in one of the folders."""
    homes = [folder.resolve() for folder in folders]
    # Compare the text first: merely accessing a path can contact another machine.
    spelled = Path(os.path.abspath(path))  # noqa: PTH100, resolve() would look
    if not any(spelled.is_relative_to(home) for home in (*homes, *(folder.absolute() for folder in folders))):
        return None
    place = path.resolve()
    return place if any(place.is_relative_to(home) for home in homes) else None


def _unquote(text: str, start: int) -> Iterator[bytes]:
    """Percent-decode a text from ``start``, in pieces: decoding it at once would take many times its memory."""
    while start < len(text):
        end = min(start + _CHUNK, len(text))
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
    """Decode a text from ``start``: base64 or percent-encoded, a piece at a time so that other threads can run."""
    size = len(text) - start
    # Checked before decoding. A percent-encoded byte takes up to three characters.
    if size > (limit * 4 // 3 + 4 if coded else 3 * limit):
        raise ValueError(f"{shorten(text)} holds more than the {limit:,} bytes allowed for {_NAMES[kind]}")
    hold(size * 3 // 4 if coded else size)
    pieces = _unquote(text, start)
    data = io.BytesIO()
    try:
        for piece in _decoded_base64(pieces) if coded else pieces:
            data.write(piece)
    except binascii.Error as error:
        raise ValueError(f"{shorten(text)} is not valid base64: {error}") from error
    if not data.tell():
        raise ValueError(f"{shorten(text)} is empty; expected a file's content in base64, or after the comma")
    return _check_size(data.getvalue(), limit, kind)


def _decoded_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Decode base64 as browsers do: padding is optional, and the URL-safe alphabet is accepted."""
    rest, padding = b"", b""
    for piece in pieces:
        check_cancelled()
        text, equals, more = piece.translate(_PLAIN_ALPHABET, b" \t\r\n\f\v").partition(b"=")
        if (padding and text) or more.strip(b"="):
            raise binascii.Error("data after the padding")
        padding += equals
        rest += text
        whole = len(rest) // 4 * 4
        yield base64.b64decode(rest[:whole], validate=True)
        rest = rest[whole:]
    yield base64.b64decode(rest + b"=" * (-len(rest) % 4), validate=True)


def _check_size(data: bytes, limit: int, kind: str) -> bytes:
    if len(data) > limit:
        raise ValueError(f"{_NAMES[kind]} of {len(data):,} bytes; at most {limit:,} are allowed")
    return data
