"""Images on the way to the encoder: identified by content at once, resized only where and when they are encoded.

F images of one shape, C crops, S side of a crop in pixels, Y and X sides of an image, H channels.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from aria import ops
from aria.media.budgets import PixelBudget
from aria.media.limits import MediaSettings
from aria.media.open import open_media
from aria.media.progress import ProgressCounter
from aria.media.read import ScaledImage, convert_in_memory, read_image
from aria.processor.image import AriaImageProcessor, NeededSizes, TilePlan
from aria.workers.cancellation import check_cancelled, map_in_context

MOST_THREADS = 16
PIECE_BYTES = 1 << 20
"""Bytes that one call hashes."""
UPLOAD_BYTES = 64 << 20
"""Images of one shape are uploaded together, up to this many bytes at a time."""
PATCHES_PER_TOKEN = 20
"""Upper bound of the patches that Aria's projector condenses into one image token, for estimates."""
# Since version 13, Pillow resizes the height first where it shrinks much more than the width.
_PILLOW_CHOOSES = int(PIL.__version__.split(".")[0]) >= 13


Pixels = TypeVar("Pixels", np.ndarray, Tensor)
"""uint8 pixels, on the host or on a device."""


class Crops(NamedTuple):
    """Input of the vision encoder before normalisation."""

    pixels: Tensor
    """uint8 ``(C, 3, S, S)``; padding at the right and bottom of a crop is black."""
    extents: tuple[tuple[int, int], ...]
    """(height, width) of each crop without its padding."""
    key: bytes | None = None
    """Key of the image, if all crops come from one; equal for equal crops."""


@dataclass(frozen=True, eq=False)
class ImageInput:
    """An RGB image, and how it is cut into crops."""

    pages: tuple[np.ndarray, ...]
    """uint8 ``(Y, X, 3)``: the pixels that each tile plan resizes; often the same array."""
    size: int
    """S."""
    tile_plans: tuple[TilePlan, ...]
    extents: tuple[tuple[int, int], ...]
    """(height, width) of each crop without its padding."""
    key: bytes
    """Digest of everything that the crops depend on: the pixels, and how they are resized and cut."""

    @classmethod
    def of(
        cls,
        source: Any,
        processor: AriaImageProcessor,
        *,
        max_image_size: int | None = None,
        split_image: bool | None = None,
        split_mode: str | None = None,
    ) -> ImageInput:
        """Read an image of any kind that :func:`~aria.media.read.load_image` takes, without resizing it yet.

        The other arguments are those of a call of the image processor, for one image.
        """
        own = {"max_image_size": max_image_size, "split_image": split_image, "split_mode": split_mode}
        return read_image_inputs([source], processor, [own])[0]

    def load(self, device: torch.device | str = "cpu") -> Crops:
        """Its crops on a device; the pixels are the same on every device."""
        return load_crops([self], device)[0]


@dataclass(frozen=True, eq=False)
class ImageSpan:
    """A run of image tokens in a prompt, and the image that provides their embeddings."""

    start: int
    """Position of the first one in the prompt."""
    tokens: int
    key: bytes | None
    """Digest of everything that the embeddings depend on. None keeps blocks from here on out of the prefix cache."""
    data: Any = None
    """An `ImageInput` to encode, or image tokens ``(tokens, D)``. The scheduler does not read it."""
    patches: int = -1
    """Patches to encode: 0 if ``data`` is encoded already, -1 for an estimate from the number of tokens."""

    def __post_init__(self) -> None:
        if self.patches < 0:
            object.__setattr__(self, "patches", self.tokens * PATCHES_PER_TOKEN)

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True)
class Medium:
    """What one image, clip or document of a conversation adds to the prompt."""

    kind: str
    """image, video or document."""
    count: int
    """1, or the number of frames or pages."""
    crops: int
    tokens: int
    """Image tokens; the text around them does not count."""
    total: int | None = None
    """Pages of the whole document."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """One conversation, ready for the engine."""

    ids: list[int]
    """Token ids of the prompt, image token ids included."""
    images: list[ImageSpan]
    """In the order of their positions."""
    media: list[Medium] = field(default_factory=list)
    """One for each part of the messages with an image, clip or document, in their order."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer: the end of a turn after messages, none after plain text."""
    digests: dict[int, list[bytes]] = field(default_factory=dict, init=False, compare=False, repr=False)
    """By block size: digests of the prompt's blocks in an engine's KV cache, once the engine has computed them."""

    @property
    def pictures(self) -> list[ImageSpan]:
        """Deprecated name of :attr:`images`."""
        warnings.warn("Prepared.pictures is now Prepared.images", DeprecationWarning, stacklevel=2)
        return self.images


def read_image_inputs(
    sources: Sequence[Any],
    processor: AriaImageProcessor,
    settings: Sequence[dict[str, Any]],
    media: MediaSettings | None = None,
    budget: PixelBudget | None = None,
) -> list[ImageInput]:
    """:meth:`ImageInput.of` for several sources.

    Args:
        sources: images of any kind that :func:`~aria.media.read.load_image` takes.
        processor: whose rules of resizing and cutting apply.
        settings: of each source, arguments of a call of the processor.
        media: limits on what is read; None means the defaults of :class:`~aria.media.open.MediaSettings`.
        budget: pixels that the images may have together; None means ``media.prompt_pixels``.
    """
    media = media or MediaSettings()
    budget = budget or PixelBudget(media.prompt_pixels)
    progress = ProgressCounter("image", sum(not isinstance(source, ScaledImage | np.ndarray) for source in sources))
    needed = [NeededSizes(processor, **own) for own in settings]
    loaded = _map_in_threads(lambda source, sizes: _read(source, media, budget, progress, sizes), sources, needed)
    # Hashed in pieces, so that several threads can share a large image.
    pieces = [
        array.reshape(-1).data[at : at + PIECE_BYTES]
        for image in loaded
        for array in image.arrays
        for at in range(0, array.size, PIECE_BYTES)
    ]
    digests = iter(_map_in_threads(lambda piece: hashlib.sha256(piece).digest(), pieces))
    images = []
    for image, own in zip(loaded, settings, strict=True):
        size = own.get("max_image_size") or processor.max_image_size
        tile_plans = tuple(processor.tile_plans(image.size, **own))
        fits = [
            processor.fit((right - left, low - top), size) for s in tile_plans for left, top, right, low in s.pieces
        ]
        extents = tuple((height, width) for width, height in fits)
        key = hashlib.sha256(repr((*image.size, size, tile_plans, extents)).encode())
        for array in image.arrays:
            for _ in range(0, array.size, PIECE_BYTES):
                key.update(next(digests))
        pages = image.arrays
        if image.is_scaled:
            tile_plans = tuple(_drawn(plan, page) for plan, page in zip(tile_plans, pages, strict=True))
        else:
            pages *= len(tile_plans)
        images.append(ImageInput(pages, size, tile_plans, extents, key.digest()))
    return images


def _drawn(plan: TilePlan, page: np.ndarray) -> TilePlan:
    """The tile plan of a page that was resized when it was read."""
    size = page.shape[1], page.shape[0]
    return TilePlan(size, size, (0, 0), ((0, 0, *size),)) if plan.is_whole else plan


def load_crops(images: Sequence[ImageInput], device: torch.device | str) -> list[Crops]:
    """Crops of several images on a device; images of one shape are uploaded and resized together."""
    device = torch.device(device)
    crops: list[Crops | None] = [None] * len(images)
    for group in _same_shape(images):
        first, pages = images[group[0]], [images[i].pages for i in group]
        if device.type == "cpu":
            # In NumPy: a thread that runs PyTorch operations gets a team of OpenMP threads, and with more threads than
            # cores all of them wait for each other asleep, which doubles the time of small operations.
            stacked = _load_pages(pages, lambda images: np.stack(images))
            loaded = torch.from_numpy(np.ascontiguousarray(_cut(stacked, first).transpose(0, 1, 4, 2, 3)))
        else:
            sent = _load_pages(pages, lambda images: _upload(images, device))
            loaded = _cut(sent, first).permute(0, 1, 4, 2, 3)
        for i, one in zip(group, loaded.unbind(), strict=True):
            crops[i] = Crops(one, images[i].extents, images[i].key)
    return [one for one in crops if one is not None]


def _load_pages(images: Sequence[Sequence[np.ndarray]], load: Callable[[Sequence[np.ndarray]], Pixels]) -> list[Pixels]:
    """Load the first pages of all images together, then their second pages, and so on; a repeated page only once."""
    loaded: dict[int, Pixels] = {}
    for k, page in enumerate(images[0]):
        if id(page) not in loaded:
            loaded[id(page)] = load([pages[k] for pages in images])
    return [loaded[id(page)] for page in images[0]]


def _read(
    source: Any, media: MediaSettings, budget: PixelBudget, progress: ProgressCounter, sizes: NeededSizes
) -> ScaledImage:
    check_cancelled()
    if isinstance(source, ScaledImage):
        return source
    # Always a copy: the caller may change its array between hashing and loading.
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,) and source.size:
        return ScaledImage.from_array(np.array(source, order="C"))
    loaded = convert_in_memory(source, media)
    if loaded is not None:
        image = ScaledImage.from_array(np.asarray(loaded))
    else:
        image = read_image(open_media(source, "image", media), media, budget.spend, sizes)
    if not isinstance(source, np.ndarray):
        progress.add()
    return image


def _same_shape(images: Sequence[ImageInput]) -> Iterable[list[int]]:
    """Indices of images that become crops in the same way, in portions of :data:`UPLOAD_BYTES`."""
    groups: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        shapes = [page.shape for page in image.pages]
        distinct = len({id(page) for page in image.pages})
        groups.setdefault((*shapes, distinct, image.size, image.tile_plans, image.extents), []).append(i)
    for group in groups.values():
        portion = max(1, UPLOAD_BYTES // sum(page.size for page in images[group[0]].pages))
        yield from (group[at : at + portion] for at in range(0, len(group), portion))


def _upload(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    staged = torch.empty(len(images), *images[0].shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    _map_in_threads(np.copyto, staged.numpy(), images)
    return staged.to(device, non_blocking=True)


def _map_in_threads(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """Like ``map``, on several threads: decoding, fetching, hashing and copying release the GIL."""
    calls = list(zip(*arguments, strict=True))
    if len(calls) < 2:
        return [function(*call) for call in calls]
    with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1, MOST_THREADS)) as pool:
        return map_in_context(pool, lambda call: function(*call), calls)


def _cut(pages: Sequence[Pixels], image: ImageInput) -> Pixels:
    """Crops uint8 ``(F, C, S, S, 3)`` of images that are all cut like ``image``; their pages are ``(F, Y, X, 3)``."""
    F, S = len(pages[0]), image.size
    [whole] = image.extents if len(image.extents) == 1 else [None]
    if whole == (S, S) == pages[0].shape[1:3]:
        return pages[0][:, None]
    crops = _black(pages[0], F, len(image.extents), S, S, 3)
    extents = iter(enumerate(image.extents))
    for page_FYXH, plan in zip(pages, image.tile_plans, strict=True):
        page = _resize(page_FYXH, *plan.drawn)
        if plan.size != plan.drawn:
            canvas = _black(page, F, plan.size[1], plan.size[0], 3)
            x, y = plan.offset
            canvas[:, y : y + plan.drawn[1], x : x + plan.drawn[0]] = page
            page = canvas
        for left, top, right, low in plan.pieces:
            i, (height, width) = next(extents)
            crops[:, i, :height, :width] = _resize(page[:, top:low, left:right], width, height)
    return crops


def _black(like: Pixels, *shape: int) -> Pixels:
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def _resize(images_FYXH: Pixels, width: int, height: int) -> Pixels:
    old_height, old_width = images_FYXH.shape[1:3]
    if (old_height, old_width) == (height, width):
        return images_FYXH
    if isinstance(images_FYXH, Tensor):
        return resize_as_pillow(images_FYXH, width, height)
    images = (Image.fromarray(np.ascontiguousarray(image)) for image in images_FYXH)
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images])


def resize_as_pillow(images_FYXH: Tensor, width: int, height: int) -> Tensor:
    """Resize as the installed version of Pillow does, bit for bit, on any device."""
    old_height, old_width = images_FYXH.shape[1:3]
    passes = [(-2, width), (-3, height)]
    if _PILLOW_CHOOSES and height < old_height and old_height - height > 2 * (old_width - width):
        passes.reverse()
    for dim, target in passes:
        if images_FYXH.shape[dim] != target:
            images_FYXH = ops.resample(images_FYXH, dim, target)
    return images_FYXH
