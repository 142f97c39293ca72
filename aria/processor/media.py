"""One door for pictures: PIL pictures, arrays, tensors, paths, bytes, data: URIs and http(s) addresses become RGB.

Every limit on size, time and address is a constant of this file.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import re
import struct
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 120_000_000
"""Pictures whose header announces more pixels are refused before they are decoded (360 MB as RGB)."""
MAX_BYTES = 64 * 2**20
"""Largest picture that is fetched from an address or unpacked from a data: URI."""
SOCKET_TIMEOUT = 10.0
"""Seconds without a byte after which an address is given up."""
FETCH_TIMEOUT = 60.0
"""Seconds after which an address is given up, however slowly it keeps sending."""

# Raster formats only: Pillow can also open PostScript (which runs Ghostscript) and others that have no place here.
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_ORIENTATION = 0x0112
# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, IndexError, struct.error, EOFError)


def load_image(source: Any) -> Image.Image:
    """A picture of any kind as an RGB ``PIL.Image``, upright.

    Rules:
        * EXIF orientation is applied; of an animation the first frame (of a PIL object: its current frame) is taken.
        * Alpha is dropped as ``PIL.Image.convert("RGB")`` drops it, because the authors and transformers show the
          model exactly that; put a transparent picture on a background of your choice first if it matters.
        * 16-bit grey is scaled to 8 bits, never clipped.
        * Arrays are ``(H, W)`` grey or ``(H, W, C)`` or ``(C, H, W)`` with C = 1, 3 or 4. Where both readings are
          possible arrays are read as channels last and torch tensors as channels first. uint8 is taken as it is, bool
          as black and white, uint16 is scaled, floating values must lie in 0..1.

    Args:
        source: ``PIL.Image.Image``, numpy array, torch tensor, path (str or Path), bytes, ``data:`` URI, or an
            ``http://`` or ``https://`` address.

    Raises:
        FileNotFoundError: no file at the path.
        ValueError: not a picture, damaged, too large, or an address that is not allowed or does not answer.
        TypeError: ``source`` is none of these kinds.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the picture")
    if isinstance(source, np.ndarray):
        return _from_array(source, channels_first=False)
    if isinstance(source, torch.Tensor):
        return _from_array(_tensor_to_array(source), channels_first=True)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open(io.BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _open(io.BytesIO(_read_data_uri(source)), _short(source))
    scheme = _SCHEME.match(source) if isinstance(source, str) else None
    if scheme:
        if scheme[1].lower() not in ("http", "https"):
            raise ValueError(
                f"addresses of kind {scheme[1]}:// are not read ({_short(source)}); use http://, https:// or a path"
            )
        return _open(io.BytesIO(fetch(source)), _short(source))
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(source))
    raise TypeError(
        f"a picture cannot be a {type(source).__name__}; pass a PIL picture, an array, a tensor, a path, bytes, a "
        "data: URI or an http(s) address"
    )


def fetch(url: str) -> bytes:
    """Body of an http(s) address, at most :data:`MAX_BYTES`, within :data:`FETCH_TIMEOUT` seconds.

    Raises:
        ValueError: the address does not answer, answers with an error, or sends too much or too slowly.
    """
    # Only these handlers: a redirect to file://, ftp:// or data: finds no handler and fails.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    deadline = time.monotonic() + FETCH_TIMEOUT
    body = bytearray()
    try:
        address = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters that no address has
        request = urllib.request.Request(address, headers={"User-Agent": "aria-moe"})
        with opener.open(request, timeout=SOCKET_TIMEOUT) as response:
            # read1 returns what one read of the socket gave, so that a slow sender cannot hold us past the deadline.
            while chunk := response.read1(1 << 16):
                body += chunk
                if len(body) > MAX_BYTES:
                    raise ValueError(f"{_short(url)} sends more than the {MAX_BYTES >> 20} MiB allowed for a picture")
                if time.monotonic() > deadline:
                    raise ValueError(f"{_short(url)} took longer than {FETCH_TIMEOUT:g} s")
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"could not fetch {_short(url)}: {error or type(error).__name__}") from error
    return bytes(body)


def _from_path(path: Path) -> Image.Image:
    path = path.expanduser()
    try:
        exists, is_file = path.exists(), path.is_file()
    except (OSError, ValueError) as error:  # far too long, or with a null character
        raise ValueError(
            f"{_short(str(path))} cannot be a path; a picture in base64 begins with data:image/png;base64,"
        ) from error
    if not exists:
        raise FileNotFoundError(f"no picture at {str(path)!r}; check the path")
    if not is_file:
        raise ValueError(f"{str(path)!r} is a folder or device, not a picture")
    with path.open("rb") as file:
        return _open(file, repr(str(path)))


def _open(file: Any, name: str) -> Image.Image:
    Image.init()  # registers every format, so that the ones this build of Pillow lacks can be left out
    try:
        image = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a known format ({', '.join(_FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} announces more than the {MAX_PIXELS:,} pixels allowed; scale it down first"
        ) from error
    except _DAMAGE as error:
        raise ValueError(_damaged(name, error)) from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{name} announces {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} allowed; "
                "scale it down first"
            )
        return _upright_rgb(image, name)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise ValueError(f"{name} is empty ({image.width} x {image.height} pixels)")
    try:
        image.load()
        image = _upright(image)
        return image if image.mode == "RGB" else _to_rgb(image)
    except _DAMAGE as error:
        raise ValueError(_damaged(name, error)) from error


def _damaged(name: str, error: Exception) -> str:
    return f"{name} cannot be read ({error}); the file may be truncated or damaged"


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError, struct.error):
        return image  # unreadable metadata says nothing about the orientation
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.uint16), channels_first=False)
    if image.mode == "I":
        return _from_array(_narrow(np.asarray(image)), channels_first=False)
    if image.mode == "F":
        return _from_array(np.asarray(image), channels_first=False)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Same pixels; without the entry Pillow does not advise RGBA, which would be composited onto nothing here.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _narrow(values: np.ndarray) -> np.ndarray:
    """32-bit grey, as some files store 8 or 16 bits -> uint8 or uint16, told apart by the largest value."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"grey values from {low} to {high}, expected 0..65535")
    return values.astype(np.uint8 if high <= 255 else np.uint16)


def _tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _from_array(array: np.ndarray, *, channels_first: bool) -> Image.Image:
    shape = array.shape
    if array.ndim == 3:
        last, first = shape[2] in (1, 3, 4), shape[0] in (1, 3, 4)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise ValueError(f"an array of shape {shape} is no picture: expected 1, 3 or 4 channels first or last")
        array = array[..., 0] if array.shape[2] == 1 else array[..., :3]
    elif array.ndim != 2:
        raise ValueError(
            f"an array of shape {shape} is no picture; expected (H, W), (H, W, C) or (C, H, W), one at a time"
        )
    if not array.size:
        raise ValueError(f"an array of shape {shape} is an empty picture")
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array))).convert("RGB")


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255: rounds, never clips
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(
                f"a picture of {array.dtype} values from {low:g} to {high:g}; floating values must lie in 0..1 "
                "(for 0..255, convert to uint8)"
            )
        return np.rint(array * 255).astype(np.uint8)
    raise ValueError(f"a picture of {array.dtype} values; expected uint8, uint16, bool, or floating values in 0..1")


def _read_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise ValueError(f"{_short(uri)} is not a data: URI; expected data:image/png;base64,...")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise ValueError(f"{_short(uri)} holds more than the {MAX_BYTES >> 20} MiB allowed for a picture")
    data = urllib.parse.unquote_to_bytes(body)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{_short(uri)} is not valid base64: {error}") from error


def _short(source: str) -> str:
    return repr(source if len(source) <= 100 else source[:80] + "...")
