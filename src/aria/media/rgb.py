"""Convert images in files and in memory to upright RGB."""

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

# Raster formats only: Pillow also opens PostScript (by running Ghostscript) and other formats that are unsafe here.
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
"""Upper bound of the memory per pixel while decoding: 3 to 8 for most files, 12 with transparency or 16 or 32 bits per
channel."""


def read(job: Any, name: str, settings: MediaSettings) -> dict[str, Any]:
    """Job: read an image file at the sizes needed.

    Calls ``take(pixels, bytes, width, height)`` before decoding, which returns the target sizes; none: the original
    size. Returns arrays ``(height, width, 3)``.
    """

    sizes = {}

    def take(width: int, height: int) -> None:
        pixels = width * height
        sizes[width, height] = job.call("take", pixels, pixels * PEAK_BYTES, width, height)

    with job.file() as file:
        image = decode(file, name, settings.image_pixels, take, settings.background)
    if image.size not in sizes:  # rotated by its metadata
        sizes[image.size] = job.call("sizes", *image.size)
    write_sizes(job, image, sizes[image.size])
    return {"size": image.size}


def write_sizes(job: Any, image: Image.Image, sizes: Sequence[Sequence[int]]) -> int:
    """Write an image to arrays of the job at some sizes, or as is; returns the number of arrays."""
    arrays = resize_to(image, sizes or [image.size])
    for array in arrays:
        job.array(array.shape)[:] = array
    return len(arrays)


def resize_to(image: Image.Image, sizes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Resize an RGB image to each (width, height), bicubic as in training: uint8 ``(height, width, 3)``."""
    return [
        np.asarray(image if (width, height) == image.size else image.resize((width, height), _BICUBIC))
        for width, height in sizes
    ]


def decode(
    file: BinaryIO, name: str, max_pixels: int, take: Callable[[int, int], None], background: str | None = "white"
) -> Image.Image:
    """Decode an image file to upright RGB.

    Args:
        file: Binary file at position 0.
        name: Name for error messages.
        max_pixels: Limit on width times height, checked before decoding.
        take: Called with the width and height in pixels before decoding; may raise.
        background: Colour behind transparent pixels; None: keep their stored colours.

    Raises:
        ValueError: Not an image, damaged, or more pixels than allowed.
        Cancelled: The caller was cancelled.
    """

    def check(width: int, height: int) -> None:
        if width * height > max_pixels:
            raise ValueError(
                f"{name} declares {width} x {height} pixels, more than the {max_pixels:,} allowed; scale it down first"
            )
        take(width, height)

    icon = icon_sizes(file)
    if icon:  # Pillow decodes one of its images to get its size
        check(*max(icon, key=lambda size: size[0] * size[1]))
    Image.init()  # registers all formats, so that those missing from this build of Pillow can be left out
    try:
        file, inverted = strip_metadata(file)
        image = Image.open(
            _CancellableFile(file),  # type: ignore[arg-type]  # Pillow asks for these methods alone
            formats=[f for f in _FORMATS if f in Image.OPEN],
        )
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image in a known format ({', '.join(_FORMATS)}), or is damaged") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} declares more than the {max_pixels:,} pixels allowed; scale it down first") from error
    except Exception as error:
        raise ValueError(_damaged(name, error)) from error
    with image:
        if image.format != "ICO":
            check(*image.size)
        if image.format == "TIFF":
            image.info.pop("xmp", None)  # Pillow rewrites it while loading, which may fail
        rgb = upright_rgb(image, name, background)
        return ImageOps.invert(rgb) if inverted else rgb


class _CancellableFile:
    """A file whose reads check for cancellation."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        check_cancelled()
        return self._file.read(size)


def upright_rgb(image: Image.Image, name: str, background: str | None = "white") -> Image.Image:
    """Convert an image in memory to upright RGB, with transparent pixels on ``background`` (see :func:`decode`)."""
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
    # Pillow's own exif_transpose also rewrites the metadata, and fails if they are malformed.
    try:
        orientation = image.getexif().get(_ORIENTATION)
        method = _TRANSPOSED.get(orientation)  # type: ignore[arg-type]  # any value from the file
    except Exception:  # unreadable metadata: no orientation
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
        # Same pixels, without Pillow's warning about transparency.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, background: str | None) -> Image.Image:
    """Convert grey of more than 8 bits."""
    values = np.asarray(image)
    grey = values.astype(np.uint16) if image.mode.startswith("I;16") else _narrow(values)
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS_PER_SAMPLE) == (12,):
        grey = grey << 4 | grey >> 8
    if image.format == "TIFF" and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 65535 - grey  # Pillow inverts only up to 8 bits
    rgb = from_array(grey, channels_first=False, background=background)
    if background is not None and "transparency" in image.info:
        rgb.paste(background, None, Image.fromarray(values == image.info["transparency"]))
    return rgb


def composite(image: Image.Image, background: str) -> Image.Image:
    """Composite an image with transparent pixels onto a colour; returns RGB."""
    if image.mode == "La":  # the only mode without a direct conversion
        image = image.convert("LA")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() != (255, 255):
        canvas = Image.new("RGBA", image.size, background)
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def _narrow(values: np.ndarray) -> np.ndarray:
    """Convert 32-bit grey, in which some files store 8 or 16 bits, to uint8 or uint16 by the largest value."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"grey values from {low} to {high}, expected 0..65535")
    return values.astype(np.uint8 if high <= 255 else np.uint16)


def tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()  # which NumPy lacks


def from_array(array: np.ndarray, *, channels_first: bool, background: str | None = "white") -> Image.Image:
    """Convert an array, in any layout that :func:`aria.media.read.load_image` accepts, to RGB."""
    shape = array.shape
    if array.ndim == 3:
        last, first = shape[2] in (1, 3, 4), shape[0] in (1, 3, 4)
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        elif not last:
            raise ValueError(f"an array of shape {shape} is not an image: expected 1, 3 or 4 channels first or last")
        if array.shape[2] == 1:
            array = array[..., 0]
        elif background is None:
            array = array[..., :3]
    elif array.ndim != 2:
        raise ValueError(
            f"an array of shape {shape} is not an image; expected (H, W), (H, W, C) or (C, H, W), one at a time"
        )
    if not array.size:
        raise ValueError(f"an array of shape {shape} is an empty image")
    image = Image.fromarray(np.ascontiguousarray(_to_uint8(array)))
    return image.convert("RGB") if background is None or image.mode != "RGBA" else composite(image, background)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255: rounds without clipping
    if np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also rejects NaN
            raise ValueError(
                f"an image of {array.dtype} values from {low:g} to {high:g}; floating-point values must be in 0..1 "
                "(for 0..255, convert to uint8)"
            )
        levels: np.ndarray = np.rint(array * 255).astype(np.uint8)
        return levels
    raise ValueError(
        f"an image of {array.dtype} values; expected uint8, uint16, bool, or floating-point values in 0..1"
    )
