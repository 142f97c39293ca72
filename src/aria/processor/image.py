"""Convert images to square crops and masks, by the rules of Aria's training.

Shape letters: C crops (of all images of a call), S side of a crop in pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from aria.config import CONFIG_NAME
from aria.hub import resolve, write_json
from aria.media.read import load_image
from aria.processor.batch import BatchFeature, check_tensor_kind
from aria.processor.files import (
    PREPROCESSOR_CONFIG,
    PROCESSOR_CONFIG,
    SIZE_CONVERSION,
    read_image_settings,
    read_size_conversion,
)

SPLIT_MODES = ("authors", "pad")

# The grids for splitting an image, as listed by the authors; the order decides ties.
_GRIDS = (
    *((1, n) for n in range(2, 9)),
    *((2, 4), (2, 3), (2, 2), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2)),
    *((n, 1) for n in range(5, 9)),
)


class TilePlan(NamedTuple):
    """A plan for crops of an image: resize it, paste it onto black, cut pieces. Sizes are (width, height)."""

    drawn: tuple[int, int]
    """Size to resize the image to."""
    size: tuple[int, int]
    """Size of the canvas."""
    offset: tuple[int, int]
    """Position of the image on the canvas."""
    pieces: tuple[tuple[int, int, int, int], ...]
    """(left, top, right, bottom) of each piece, which is then resized to its crop."""

    @property
    def is_whole(self) -> bool:
        """Whether the whole image is the only piece, without a canvas."""
        return self.drawn == self.size and self.pieces == ((0, 0, *self.size),)


class NeededSizes:
    """Maps the size of an image to the sizes from which its crops are made.

    Args:
        processor: The image processor.
        settings: ``max_image_size``, ``split_image`` and ``split_mode`` of a call, for one image.
    """

    def __init__(self, processor: AriaImageProcessor, **settings: Any):
        self._processor, self._settings = processor, settings
        self.key = (
            *settings.items(), processor.max_image_size, processor.min_image_size, processor.split_image,
            processor.split_mode, *processor.split_resolutions,
        )  # fmt: skip

    def __call__(self, width: int, height: int) -> list[tuple[int, int]]:
        """(width, height) for each tile plan; empty if the original image has fewer pixels."""
        size = self._settings.get("max_image_size") or self._processor.max_image_size
        tile_plans = self._processor.tile_plans((width, height), **self._settings)
        needed = [self._processor.fit(sheet.drawn, size) if sheet.is_whole else sheet.drawn for sheet in tile_plans]
        return needed if sum(across * down for across, down in needed) < width * height else []


class AriaImageProcessor:
    """Converts images to ``pixel_values``, ``pixel_mask`` and ``num_crops``.

    Without splitting, every image is one crop: resized (bicubic) so that its longer side is S and its shorter side at
    least ``min_image_size`` (which distorts elongated images, as in training), padded with black at the right and
    bottom, scaled to 0..1 and normalized. With splitting, an image is cut into a grid of crops:

    * ``split_mode="authors"``: the grid of nearest aspect ratio, to which the image is stretched, after the whole image
      as an overview.
    * ``split_mode="pad"``: as in transformers: least wasted area, aspect ratio kept, centred on black, no overview.

    Source: the authors' vision processor. Without splitting, transformers' ``AriaImageProcessorPil`` gives identical
    bits.
    """

    def __init__(
        self,
        *,
        max_image_size: int = 980,
        min_image_size: int = 336,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        split_image: bool = False,
        split_mode: str = "authors",
        sizes: Sequence[int] = tuple(SIZE_CONVERSION),
        split_resolutions: Sequence[Sequence[int]] | None = None,
        do_convert_rgb: bool = True,
    ) -> None:
        """
        Args:
            max_image_size: Default side S of a crop.
            min_image_size: Minimum length of the shorter side after resizing.
            image_mean: Mean per channel of values in 0..1.
            image_std: Standard deviation per channel of values in 0..1.
            split_image: Whether to split by default.
            split_mode: "authors" or "pad".
            sizes: The sides S for which the projector of the model has queries.
            split_resolutions: (height, width) pairs for "pad"; by default every grid times the smallest size.
            do_convert_rgb: False rejects images in memory that are not RGB. Files are always read as RGB.
        """
        self.sizes = tuple(sorted(int(size) for size in sizes))
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"sizes should be pixel counts above 0, but are {sizes!r}")
        if not 1 <= min_image_size <= self.sizes[0]:
            raise ValueError(
                f"min_image_size {min_image_size} should lie between 1 and the smallest crop size, {self.sizes[0]}"
            )
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != 3:
                raise ValueError(f"{name} should hold 3 values, but is {values!r}")
        self.max_image_size = self._check_size(max_image_size)
        self.min_image_size = min_image_size
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.split_image = split_image
        self.split_mode = _check_mode(split_mode)
        self.do_convert_rgb = do_convert_rgb
        base = self.sizes[0]
        pairs = split_resolutions or [(h * base, w * base) for h, w in _GRIDS]
        self.split_resolutions = [(int(h), int(w)) for h, w in pairs]
        # Value of each grey level, computed in the precision and order of transformers' PIL backend: same bits.
        levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        self._levels = [(levels - np.float32(m)) / np.float32(s) for m, s in zip(image_mean, image_std, strict=True)]

    @classmethod
    def from_pretrained(
        cls, path_or_repo_id: str | os.PathLike[str] | None = None, *, revision: str | None = None
    ) -> AriaImageProcessor:
        """Read ``preprocessor_config.json``, and the allowed sizes from ``config.json`` if the folder has one.

        Raises:
            FileNotFoundError: No such folder, repository or file.
            ValueError: The file has unsupported preprocessing settings.
        """
        patterns = [PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, CONFIG_NAME]
        folder = resolve(path_or_repo_id, revision=revision, allow_patterns=patterns)
        file, data = read_image_settings(folder)
        try:
            return cls.from_dict(data, sizes=tuple(read_size_conversion(folder)))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **changes: Any) -> AriaImageProcessor:
        """Make a processor from a ``preprocessor_config.json`` object; the inverse of :meth:`to_dict`.

        Args:
            data: Settings as written by transformers or the authors. Unknown keys are ignored.
            changes: Settings that override those of ``data``, also ``sizes``.

        Raises:
            ValueError: A setting with the wrong type or an unsupported value.
            TypeError: A change with an unknown name.
        """
        if unknown := sorted(changes.keys() - {*_STEPS, *_ARITHMETIC, *_KINDS, "rescale_factor", "sizes"}):
            raise TypeError(f"the image processor has no {', '.join(unknown)}; it has {', '.join(_KINDS)}")
        data = {**data, **{key: value for key, value in changes.items() if value is not None}}
        _check_settings(data)
        return cls(**{key: data[key] for key in (*_KINDS, "sizes") if data.get(key) is not None})

    def changed(self, **changes: Any) -> AriaImageProcessor:
        """A copy with some settings changed, see :meth:`from_dict`; itself without changes."""
        return type(self).from_dict(self.to_dict(), sizes=self.sizes, **changes) if changes else self

    def to_dict(self) -> dict[str, Any]:
        """The object of ``preprocessor_config.json``, also accepted by transformers' ``from_dict``."""
        return {
            "image_processor_type": "AriaImageProcessor",
            "processor_class": "AriaProcessor",
            "do_convert_rgb": self.do_convert_rgb,
            "do_rescale": True,
            "do_normalize": True,
            "resample": 3,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "max_image_size": self.max_image_size,
            "min_image_size": self.min_image_size,
            "split_image": self.split_image,
            "split_mode": self.split_mode,
            "split_resolutions": [list(pair) for pair in self.split_resolutions],
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``preprocessor_config.json``, which transformers and vLLM can read. Creates the folder if needed."""
        write_json(Path(folder) / PREPROCESSOR_CONFIG, self.to_dict())

    def __call__(
        self,
        images: Any,
        *,
        max_image_size: int | None = None,
        split_image: bool | Sequence[bool] | None = None,
        split_mode: str | None = None,
        return_tensors: str | None = "pt",
        **settings: Any,
    ) -> BatchFeature:
        """Prepare one image or a list of images, of any kind that :func:`~aria.media.read.load_image` accepts.

        Args:
            images: One image or a list. Nested lists and arrays of several images, ``(N, H, W, C)`` or
                ``(N, C, H, W)``, are flattened.
            max_image_size: Side S of the crops; None: the processor's default.
            split_image: Whether to split, for all images or per image; None: the processor's default.
            split_mode: "authors" or "pad"; None: the processor's default.
            return_tensors: "pt" (default) or "np"; None: "pt", with ``num_crops`` as a list.
            settings: Other settings of :meth:`from_dict` for this call, such as ``min_image_size``.

        Returns:
            ``pixel_values`` (C, 3, S, S) float32; ``pixel_mask`` (C, S, S) bool, True for pixels of the image and False
            for padding; ``num_crops`` (images,) int64, also as an attribute, a list.

        Raises:
            ValueError: A size without queries in the model, no images, an image that cannot be read, or an unsupported
                setting.
        """
        if settings:
            return self.changed(**settings)(
                images,
                max_image_size=max_image_size,
                split_image=split_image,
                split_mode=split_mode,
                return_tensors=return_tensors,
            )
        size = self.max_image_size if max_image_size is None else self._check_size(max_image_size)
        mode = self.split_mode if split_mode is None else _check_mode(split_mode)
        check_tensor_kind(return_tensors)
        images = flatten_images(images)
        if not images:
            raise ValueError("no images given; pass one image or a list of them")
        if split_image is None or isinstance(split_image, bool):
            splits = [self.split_image if split_image is None else split_image] * len(images)
        else:
            splits = list(split_image)
            if len(splits) != len(images):
                raise ValueError(f"{len(splits)} values of split_image for {len(images)} images")
        crops: list[Image.Image] = []
        num_crops = []
        for image, split in zip(images, splits, strict=True):
            if not self.do_convert_rgb:
                require_rgb(image)
            image = load_image(image)
            pieces = self._cut(image, self.tile_plans(image.size, size, split, mode), size)
            crops += pieces
            num_crops.append(len(pieces))
        values, mask = self._to_arrays(crops, size)
        data: dict[str, Any] = {"pixel_values": values, "pixel_mask": mask, "num_crops": np.array(num_crops)}
        if return_tensors != "np":
            data = {name: torch.from_numpy(array) for name, array in data.items()}
        if return_tensors is None:
            data["num_crops"] = num_crops
        return BatchFeature(data, num_crops=num_crops)

    def _check_size(self, size: int) -> int:
        if size not in self.sizes:
            raise ValueError(
                f"max_image_size {size!r} is not one of this model's sizes: {', '.join(map(str, self.sizes))}"
            )
        return int(size)

    def fit(self, image_size: tuple[int, int], size: int) -> tuple[int, int]:
        """(width, height) of an image in a crop of side ``size``, which its longer side fills."""
        width, height = image_size
        scale = size / max(width, height)
        if width >= height:
            return size, max(int(height * scale), self.min_image_size)
        return max(int(width * scale), self.min_image_size), size

    def tile_plans(
        self,
        image_size: tuple[int, int],
        max_image_size: int | None = None,
        split_image: bool | None = None,
        split_mode: str | None = None,
    ) -> list[TilePlan]:
        """Plan the crops of an image of (width, height), without its pixels.

        The other arguments are those of a call, for one image. Each piece of a plan becomes a crop.
        """
        size = self.max_image_size if max_image_size is None else self._check_size(max_image_size)
        mode = self.split_mode if split_mode is None else _check_mode(split_mode)
        whole = TilePlan(image_size, image_size, (0, 0), ((0, 0, *image_size),))
        if not (self.split_image if split_image is None else split_image):
            return [whole]
        if mode == "pad":
            height, width = _least_waste(image_size, self.split_resolutions)
            drawn = _inside(image_size, (width, height))
            offset = ((width - drawn[0]) // 2, (height - drawn[1]) // 2)
            return [TilePlan(drawn, (width, height), offset, _tiles((width, height), size))]
        columns, rows = _nearest_grid(image_size, size)
        stretched = (columns * size, rows * size)
        return [whole, TilePlan(stretched, stretched, (0, 0), _tiles(stretched, size))]

    def _cut(self, image: Image.Image, tile_plans: Sequence[TilePlan], size: int) -> list[Image.Image]:
        crops = []
        for sheet in tile_plans:
            page = _resized(image, sheet.drawn)
            if sheet.size != sheet.drawn:
                canvas = Image.new("RGB", sheet.size)
                canvas.paste(page, sheet.offset)
                page = canvas
            pieces = (page if piece == (0, 0, *page.size) else page.crop(piece) for piece in sheet.pieces)
            crops += [_resized(piece, self.fit(piece.size, size)) for piece in pieces]
        return crops

    def _to_arrays(self, crops: list[Image.Image], size: int) -> tuple[np.ndarray, np.ndarray]:
        values = np.empty((len(crops), 3, size, size), dtype=np.float32)
        mask = np.zeros((len(crops), size, size), dtype=np.bool_)
        for i, crop in enumerate(crops):
            width, height = crop.size
            mask[i, :height, :width] = True
            for channel, (levels, plane) in enumerate(zip(self._levels, crop.split(), strict=True)):
                target = values[i, channel]
                np.take(levels, np.asarray(plane), out=target[:height, :width], mode="clip")
                target[height:] = levels[0]  # padding is black before it is normalised
                target[:height, width:] = levels[0]
        return values, mask


def flatten_images(images: Any) -> list[Any]:
    """Flatten nested lists and arrays of several images to one list of images."""
    if isinstance(images, list | tuple):
        return [image for one in images for image in flatten_images(one)]
    several = isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4
    return list(images) if several else [images]


def require_rgb(image: Any) -> None:
    """Reject an image in memory that is not RGB."""
    if isinstance(image, Image.Image):
        holds, came = image.mode == "RGB", f"of mode {image.mode}"
    elif isinstance(image, np.ndarray | torch.Tensor):
        holds, came = image.ndim == 3 and 3 in image.shape, f"an array of {tuple(image.shape)}"
    else:
        return
    if not holds:
        raise ValueError(f"do_convert_rgb is false, but an image is {came}; leave do_convert_rgb out, or convert it")


# Steps as named by transformers. Aria performs those that are true here, and no others.
_STEPS = {"do_resize": True, "do_pad": True, "do_rescale": True, "do_normalize": True}
_ARITHMETIC = {"resample": 3, "data_format": "channels_first"}
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_image_size": (lambda value: type(value) is int, "a whole number"),
    "min_image_size": (lambda value: type(value) is int, "a whole number"),
    "split_image": (lambda value: type(value) is bool, "true or false"),
    "do_convert_rgb": (lambda value: type(value) is bool, "true or false"),
    "split_mode": (lambda value: type(value) is str, "a text"),
    "image_mean": (lambda value: _is_list(value, 3), "three numbers"),
    "image_std": (lambda value: _is_list(value, 3) and all(value), "three numbers, none of them 0"),
    "split_resolutions": (
        lambda value: isinstance(value, list) and all(_is_list(pair, 2) for pair in value),
        "a list of pairs (height, width)",
    ),
}


def _is_list(value: Any, length: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == length
        and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    )


def _check_settings(data: Mapping[str, Any]) -> None:
    """Reject settings with the wrong type and unsupported preprocessing."""
    present = {key: value for key, value in data.items() if value is not None}
    for key, value in present.items():
        if key in _KINDS:
            continue
        expected_value = _STEPS.get(key, False) if key.startswith("do_") else _ARITHMETIC.get(key, value)
        if value != expected_value:
            raise ValueError(f"{key} is {value!r}, but Aria has {expected_value!r}")
    factor = present.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor is {factor!r}, but Aria has 1/255")
    for key in ("size", "crop_size", "pad_size"):
        if key in present:
            raise ValueError(f"{key} is {present[key]!r}, but Aria's sizes are max_image_size and min_image_size")
    if not str(present.get("image_processor_type", "Aria")).startswith("Aria"):
        raise ValueError(f"image_processor_type is {present['image_processor_type']!r}, which is not Aria's")
    for key, (holds, expected) in _KINDS.items():
        if key in present and not holds(present[key]):
            raise ValueError(f"{key} is {present[key]!r}; expected {expected}")


def _check_mode(mode: str) -> str:
    if mode not in SPLIT_MODES:
        raise ValueError(f"split_mode {mode!r} is not known; use one of {', '.join(SPLIT_MODES)}")
    return mode


def _nearest_grid(image_size: tuple[int, int], size: int) -> tuple[int, int]:
    """(columns, rows) of nearest aspect ratio. On ties a later, larger grid wins if the image has enough pixels."""
    width, height = image_size
    best, least = _GRIDS[0], math.inf
    for columns, rows in _GRIDS:
        distance = abs(width / height - columns / rows)
        if distance < least or (distance == least and width * height > 0.5 * size * size * columns * rows):
            best, least = (columns, rows), distance
    return best


def _least_waste(image_size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) that keeps most pixels of the image, then wastes least. Earlier entries win ties."""
    width, height = image_size

    def fit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=fit)


def _inside(image_size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) with the aspect ratio of the image that fits in the target."""
    width, height = target
    by_width, by_height = width / image_size[0], height / image_size[1]
    if by_width < by_height:
        return width, min(math.ceil(image_size[1] * by_width), height)
    return min(math.ceil(image_size[0] * by_height), width), height


def _tiles(sheet_size: tuple[int, int], size: int) -> tuple[tuple[int, int, int, int], ...]:
    """Pieces of at most size x size, row by row, without overlap."""
    width, height = sheet_size
    return tuple(
        (x, y, min(x + size, width), min(y + size, height))
        for y in range(0, height, size)
        for x in range(0, width, size)
    )


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
