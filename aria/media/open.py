"""One door for every medium: what it is read from, whether that is allowed, and how much of it may come in."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import sys
import urllib.parse
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from aria.media import rgb
from aria.media.fetch import fetch
from aria.media.limits import MediaSettings, PixelBudget, short

__all__ = ["MediaSettings", "Opened", "fetch", "load_image", "open_medium"]

_PIECE = 1 << 16
"""Characters of a data: URI that are unquoted at a time."""
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*(data:|https?://)", re.IGNORECASE)
_BASE64 = re.compile(r";\s*base64\s*(;|$)", re.IGNORECASE)
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
_NAMES = {"image": "picture", "video": "clip", "document": "document"}
_EXAMPLES = {"image": "image/png", "video": "video/mp4", "document": "application/pdf"}


class Opened(NamedTuple):
    """A medium that was let in."""

    data: bytes | Path
    """Its bytes, or an absolute path to a file that may be read."""
    name: str
    """What errors call it."""

    def identity(self) -> tuple[object, ...]:
        """Tells it from others: a digest of its bytes, or the file with its size and the time of its last change."""
        if isinstance(self.data, bytes):
            return (hashlib.sha256(self.data).digest(),)
        state = self.data.stat()
        return self.data, state.st_size, state.st_mtime_ns, state.st_ino

    def file(self) -> BinaryIO:
        """It as a file, open for reading."""
        return io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data.open("rb")


def load_image(source: Any, settings: MediaSettings | None = None, budget: PixelBudget | None = None) -> Image.Image:
    """A picture of any kind as an RGB ``PIL.Image``, upright.

    Rules:
        * EXIF orientation is applied; of an animation the first frame (of a PIL object: its current frame) is taken.
        * Transparent pixels are composited on ``settings.background``, white by default. With ``background=None``
          they keep their stored colours, often black, as transformers shows them to the model.
        * 16-bit grey is scaled to 8 bits, never clipped.
        * Arrays are ``(H, W)`` grey or ``(H, W, C)`` or ``(C, H, W)`` with C = 1, 3 or 4. Where both readings are
          possible arrays are read as channels last and torch tensors as channels first. uint8 is taken as it is, bool
          as black and white, uint16 is scaled, floating values must lie in 0..1.

    Args:
        source: ``PIL.Image.Image``, numpy array, torch tensor, path (str or Path), bytes, ``data:`` URI, or an
            ``http://`` or ``https://`` address.
        settings: limits and permissions; None: those of :class:`MediaSettings`.
        budget: what it may take of, with others; pictures in memory take nothing.

    Raises:
        FileNotFoundError: no file at the path.
        ValueError: not a picture, damaged, too large, or an address that is not allowed or does not answer.
        TypeError: ``source`` is none of these kinds.
    """
    settings = settings or MediaSettings()
    if isinstance(source, Image.Image):
        return rgb.upright_rgb(source, "the picture", settings.background)
    if isinstance(source, np.ndarray):
        return rgb.from_array(source, channels_first=False, background=settings.background)
    torch = sys.modules.get("torch")  # who passes a tensor has imported it
    if torch is not None and isinstance(source, torch.Tensor):
        return rgb.from_array(rgb.tensor_to_array(source), channels_first=True, background=settings.background)
    opened = open_medium(source, "image", settings)
    with opened.file() as file:
        budget = budget or PixelBudget(settings.prompt_pixels)
        return rgb.decode(file, opened.name, settings.image_pixels, budget.spend, settings.background)


def open_medium(source: Any, kind: str, settings: MediaSettings) -> Opened:
    """Let a medium in, wherever it is.

    Args:
        source: path (str or Path), bytes, ``data:`` URI (its media type does not matter, the content decides), or an
            ``http://`` or ``https://`` address. White space around a URI or address is ignored.
        kind: "image", "video" or "document".
        settings: limits and permissions.

    Raises:
        FileNotFoundError: no file at the path.
        ValueError: too large, not allowed, or not to be had.
        TypeError: ``source`` is none of these kinds.
    """
    limit: int = getattr(settings, f"{kind}_bytes")
    if isinstance(source, bytes | bytearray | memoryview):
        return Opened(_within(bytes(source), limit, kind), f"{len(source)} bytes")
    if isinstance(source, str) and (_ADDRESS.match(source) or not source.strip()):
        source = source.strip()
    if source == "":
        raise ValueError(f"the address of a {_NAMES[kind]} is empty; expected http(s)://, a data: URI or a path")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return Opened(_read_data_uri(source, limit, kind), short(source))
    if isinstance(source, str) and (scheme := _SCHEME.match(source)):
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(
                f"addresses of kind {scheme[1]}:// are not read ({short(source)}); use http://, https:// or a path"
            )
        return Opened(fetch(source, limit, settings), short(source))
    if isinstance(source, str | os.PathLike):
        path = _check_path(Path(source), kind, settings.local_folders)
        return Opened(path, repr(str(source)))
    kinds = "a PIL picture, an array, a tensor, a path" if kind == "image" else "a path"
    raise TypeError(
        f"a {_NAMES[kind]} cannot be a {type(source).__name__}; pass {kinds}, bytes, a data: URI or an http(s) address"
    )


def _check_path(path: Path, kind: str, folders: tuple[Path, ...] | None) -> Path:
    """The absolute path of a file that may be read, without links on its way."""
    try:
        place = path.expanduser().resolve() if folders is None else _inside(path, folders)
        exists = place is not None and place.exists()
        readable = place is not None and place.is_file() and os.access(place, os.R_OK)
    except (OSError, ValueError, RuntimeError) as error:  # far too long, with a null character, links in a circle
        raise ValueError(
            f"{short(str(path))} cannot be a path; a {_NAMES[kind]} in base64 begins with "
            f"data:{_EXAMPLES[kind]};base64,"
        ) from error
    if place is None:
        # The same words for what is there and what is not: strangers should not learn which files exist.
        where = "outside the folders that may be read" if folders else "a local path, and none may be read here"
        raise ValueError(f"{short(str(path))} is {where}; send a data: URI or an http(s) address")
    if not exists:
        raise FileNotFoundError(f"no {_NAMES[kind]} at {str(path)!r}; check the path")
    if not readable:
        raise ValueError(f"{str(path)!r} is a folder, a device, or closed to this user, not a {_NAMES[kind]}")
    return place


def _inside(path: Path, folders: tuple[Path, ...]) -> Path | None:
    """The path with all links followed, or None unless it lies in one of the folders."""
    homes = [folder.resolve() for folder in folders]
    # First by its spelling alone: merely looking at a path can reach another machine.
    spelled = Path(os.path.abspath(path))  # noqa: PTH100, resolve() would look
    if not any(spelled.is_relative_to(home) for home in (*homes, *(folder.absolute() for folder in folders))):
        return None
    place = path.resolve()
    return place if any(place.is_relative_to(home) for home in homes) else None


def _unquote(text: str) -> bytes:
    """``%41`` and the like put back, a piece at a time: all at once they take some 75 times their memory."""
    out = bytearray()
    start = 0
    while start < len(text):
        end = min(start + _PIECE, len(text))
        if end < len(text) and (escape := text.rfind("%", end - 2, end)) > start:
            end = escape
        out += urllib.parse.unquote_to_bytes(text[start:end])
        start = end
    return bytes(out)


def _read_data_uri(uri: str, limit: int, kind: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise ValueError(f"{short(uri)} is not a data: URI; expected data:{_EXAMPLES[kind]};base64,...")
    coded = _BASE64.search(header) is not None
    # Before anything of it is unpacked. Plain bytes may be three characters each, %41.
    if len(body) > (limit * 4 // 3 + 4 if coded else 3 * limit):
        raise ValueError(f"{short(uri)} holds more than the {limit:,} bytes allowed for a {_NAMES[kind]}")
    data = _unquote(body)
    if coded:
        # As browsers do, without padding too; and in the alphabet for addresses.
        data = data.translate(_PLAIN_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except binascii.Error as error:
            raise ValueError(f"{short(uri)} is not valid base64: {error}") from error
    if not data:
        raise ValueError(f"{short(uri)} holds no bytes; expected a file's content behind the comma")
    return _within(data, limit, kind)


def _within(data: bytes, limit: int, kind: str) -> bytes:
    if len(data) > limit:
        raise ValueError(f"a {_NAMES[kind]} of {len(data):,} bytes; {limit:,} are allowed")
    return data
