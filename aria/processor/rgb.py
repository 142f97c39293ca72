"""Pictures of every kind, in files and in memory, to upright RGB."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

# Raster formats only: Pillow can also open PostScript (which runs Ghostscript) and others that have no place here.
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
_ORIENTATION = 0x0112
# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, IndexError, struct.error, EOFError, RuntimeError)


def decode(file: BinaryIO, name: str, max_pixels: int, spend: Callable[[int], None]) -> Image.Image:
    """The picture in a file; ``name`` is what errors call it. ``spend`` is told its pixels before it is decoded.

    Raises:
        ValueError: not a picture, damaged, or of more pixels than allowed.
    """
    Image.init()  # registers every format, so that the ones this build of Pillow lacks can be left out
    try:
        image = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a known format ({', '.join(_FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} announces more than the {max_pixels:,} pixels allowed; scale it down first"
        ) from error
    except _DAMAGE as error:
        raise ValueError(_damaged(name, error)) from error
    with image:
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{name} announces {image.width} x {image.height} pixels, more than the {max_pixels:,} allowed; "
                "scale it down first"
            )
        spend(image.width * image.height)
        return upright_rgb(image, name)


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
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
        return from_array(np.asarray(image).astype(np.uint16), channels_first=False)
    if image.mode == "I":
        return from_array(_narrow(np.asarray(image)), channels_first=False)
    if image.mode == "F":
        return from_array(np.asarray(image), channels_first=False)
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


def tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_array(array: np.ndarray, *, channels_first: bool) -> Image.Image:
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
