"""Pictures of every kind, in files and in memory, to upright RGB."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aria.workers.cancellation import check_cancelled

if TYPE_CHECKING:
    import torch
from aria.media.limits import MediaSettings
from aria.media.metadata import icon_sizes, strip_metadata

# Raster formats only: Pillow can also open PostScript (which runs Ghostscript) and others that have no place here.
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
_ORIENTATION = 0x0112
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BICUBIC = Image.Resampling.BICUBIC
_PHOTOMETRIC = 0x0106
_WHITE_IS_ZERO = 0
_BITS_PER_SAMPLE = 0x0102


PEAK_BYTES = 16
"""Of memory for each pixel while an image is decoded: 3 to 8 for most files, 12 where values have 16 or 32 bits or are
transparent."""


def read(job: Any, name: str, settings: MediaSettings) -> dict[str, Any]:
    """Read the image in a job's file, at the sizes that are needed.

    Calls ``take(pixels, bytes, width, height)`` before it is decoded, which gives the sizes to bring it to; none: its
    own. The result's arrays are ``(height, width, 3)``.
    """

    sizes = {}

    def take(width: int, height: int) -> None:
        pixels = width * height
        sizes[width, height] = job.call("take", pixels, pixels * PEAK_BYTES, width, height)

    with job.file() as file:
        image = decode(file, name, settings.image_pixels, take, settings.background)
    if image.size not in sizes:  # it was turned by its metadata
        sizes[image.size] = job.call("sizes", *image.size)
    write_sizes(job, image, sizes[image.size])
    return {"size": image.size}


def write_sizes(job: Any, image: Image.Image, sizes: Sequence[Sequence[int]]) -> int:
    """Hand over an image at some sizes, or as it is; how many arrays that are."""
    arrays = resize_to(image, sizes or [image.size])
    for array in arrays:
        job.array(array.shape)[:] = array
    return len(arrays)


def resize_to(image: Image.Image, sizes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """An RGB image at each (width, height), resized as the model is used to: uint8 ``(height, width, 3)``."""
    return [
        np.asarray(image if (width, height) == image.size else image.resize((width, height), _BICUBIC))
        for width, height in sizes
    ]


def decode(
    file: BinaryIO, name: str, max_pixels: int, take: Callable[[int, int], None], background: str | None = "white"
) -> Image.Image:
    """The image in a file as upright RGB.

    Args:
        file: open for reading, at its beginning.
        name: what errors call it.
        max_pixels: limit on width times height, checked before decoding.
        take: called with the width and height in pixels before they are decoded; may raise.
        background: colour behind transparent pixels; None: their stored colours.

    Raises:
        ValueError: not an image, damaged, or of more pixels than allowed.
        Cancelled: nobody waits for it any more.
    """

    def announced(width: int, height: int) -> None:
        if width * height > max_pixels:
            raise ValueError(
                f"{name} announces {width} x {height} pixels, more than the {max_pixels:,} allowed; scale it down first"
            )
        take(width, height)

    icon = icon_sizes(file)
    if icon:  # Pillow decodes one of its images to know its size
        announced(*max(icon, key=lambda size: size[0] * size[1]))
    Image.init()  # registers every format, so that the ones this build of Pillow lacks can be left out
    try:
        file, inverted = strip_metadata(file)
        image = Image.open(
            _CancellableFile(file),  # type: ignore[arg-type]  # Pillow asks for these methods alone
            formats=[f for f in _FORMATS if f in Image.OPEN],
        )
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a known format ({', '.join(_FORMATS)}), or damaged") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} announces more than the {max_pixels:,} pixels allowed; scale it down first"
        ) from error
    except Exception as error:
        raise ValueError(_damaged(name, error)) from error
    with image:
        if image.format != "ICO":
            announced(*image.size)
        if image.format == "TIFF":
            image.info.pop("xmp", None)  # which Pillow would rewrite while loading, and may stumble over
        rgb = upright_rgb(image, name, background)
        return ImageOps.invert(rgb) if inverted else rgb


class _CancellableFile:
    """A file as Pillow reads it, in pieces, between which the caller's leaving is noticed."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        check_cancelled()
        return self._file.read(size)


def upright_rgb(image: Image.Image, name: str, background: str | None = "white") -> Image.Image:
    """An image in memory as upright RGB, its transparent pixels on ``background`` (see :func:`decode`)."""
    if not image.width or not image.height:
        raise ValueError(f"{name} is empty ({image.width} x {image.height} pixels)")
    try:
        image.load()
        image = _upright(image)
        return image if image.mode == "RGB" and "transparency" not in image.info else _to_rgb(image, background)
    except Exception as error:  # decoders of damaged files raise errors of every kind
        raise ValueError(_damaged(name, error)) from error


def _damaged(name: str, error: Exception) -> str:
    return f"{name} cannot be read ({str(error) or type(error).__name__}); the file may be truncated or damaged"


def _upright(image: Image.Image) -> Image.Image:
    # Pixels only: Pillow's own exif_transpose also writes the metadata anew, and fails where they are odd.
    try:
        orientation = image.getexif().get(_ORIENTATION)
        method = _TRANSPOSED.get(orientation)  # type: ignore[arg-type]  # whatever the file holds there
    except Exception:  # unreadable metadata say nothing about the orientation
        return image
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, background: str | None) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_to_rgb(image, background)
    if image.mode == "F":
        return from_array(np.asarray(image), channels_first=False, background=background)
    if background is not None and image.has_transparency_data:
        return composite(image, background)
    if "transparency" in image.info:
        # Same pixels, without a warning from Pillow that they are transparent.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, background: str | None) -> Image.Image:
    """Grey of more than 8 bits."""
    values = np.asarray(image)
    grey = values.astype(np.uint16) if image.mode.startswith("I;16") else _narrow(values)
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS_PER_SAMPLE) == (12,):
        grey = grey << 4 | grey >> 8
    if image.format == "TIFF" and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 65535 - grey  # which Pillow does for up to 8 bits only
    rgb = from_array(grey, channels_first=False, background=background)
    if background is not None and "transparency" in image.info:
        rgb.paste(background, None, Image.fromarray(values == image.info["transparency"]))
    return rgb


def composite(image: Image.Image, background: str) -> Image.Image:
    """An image with transparent pixels, composited onto a colour; RGB."""
    if image.mode == "La":  # the only mode that needs a step between
        image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() != (255, 255):
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def _narrow(values: np.ndarray) -> np.ndarray:
    """32-bit grey, as some files store 8 or 16 bits -> uint8 or uint16, told apart by the largest value."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"grey values from {low} to {high}, expected 0..65535")
    return values.astype(np.uint8 if high <= 255 else np.uint16)


def tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()  # which NumPy lacks


def from_array(array: np.ndarray, *, channels_first: bool, background: str | None = "white") -> Image.Image:
    """An array as :func:`aria.media.open.load_image` takes it -> RGB."""
    shape = array.shape
    if array.ndim == 3:
        last, first = shape[2] in (1, 3, 4), shape[0] in (1, 3, 4)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise ValueError(f"an array of shape {shape} is no picture: expected 1, 3 or 4 channels first or last")
        if array.shape[2] == 1:
            array = array[..., 0]
        elif background is None:
            array = array[..., :3]
    elif array.ndim != 2:
        raise ValueError(
            f"an array of shape {shape} is no picture; expected (H, W), (H, W, C) or (C, H, W), one at a time"
        )
    if not array.size:
        raise ValueError(f"an array of shape {shape} is an empty picture")
    image = Image.fromarray(np.ascontiguousarray(_to_uint8(array)))
    return image.convert("RGB") if background is None or image.mode != "RGBA" else composite(image, background)


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
