"""Pictures on their way to the encoder: named by their content at once, resized only where and when they are needed.

F pictures of one shape, C crops, S side of a crop, Y and X sides of a picture, H channels.
"""

from __future__ import annotations

import hashlib
import os
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
from aria.media.limits import MediaSettings, PixelBudget
from aria.media.open import open_media
from aria.media.progress import ProgressCounter
from aria.media.read import ScaledImage, convert_in_memory, read_image
from aria.processor.image import AriaImageProcessor, NeededSizes, TilePlan
from aria.workers.cancellation import check_cancelled, map_in_context

MOST_THREADS = 16
PIECE_BYTES = 1 << 20
"""What a thread digests at a time."""
UPLOAD_BYTES = 64 << 20
"""Pictures of one shape go to the device together, up to so many bytes at a time."""
# Since its version 13 Pillow begins with the height where that shrinks much more than the width.
_PILLOW_CHOOSES = int(PIL.__version__.split(".")[0]) >= 13


Pixels = TypeVar("Pixels", np.ndarray, Tensor)
"""Grey levels, uint8, on the host or on a device."""


class Crops(NamedTuple):
    """What the vision encoder is fed from, before normalisation."""

    pixels: Tensor
    """uint8 ``(C, 3, S, S)``, black where a crop is padded at its right and bottom."""
    extents: tuple[tuple[int, int], ...]
    """(height, width) of the real pixels of each crop, from its upper left corner."""
    key: bytes | None = None
    """Of the picture that they are all of, if they are: the same crops have the same one."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in RGB, and how it becomes crops."""

    pages: tuple[np.ndarray, ...]
    """uint8 ``(Y, X, 3)``: what each sheet is drawn from; often the same picture."""
    size: int
    """S."""
    tile_plans: tuple[TilePlan, ...]
    extents: tuple[tuple[int, int], ...]
    """(height, width) of each piece in its crop."""
    key: bytes
    """Digest of all that the crops depend on: the pixels, and the rules of cutting as they apply to them."""

    @classmethod
    def of(
        cls,
        source: Any,
        processor: AriaImageProcessor,
        *,
        max_image_size: int | None = None,
        split_image: bool | None = None,
        split_mode: str | None = None,
    ) -> Picture:
        """Read a picture of any kind that :func:`~aria.media.read.load_image` takes; nothing is resized yet.

        The other arguments are those of calling the image processor, for one picture.
        """
        own = {"max_image_size": max_image_size, "split_image": split_image, "split_mode": split_mode}
        return read_pictures([source], processor, [own])[0]

    def load(self, device: torch.device | str = "cpu") -> Crops:
        """Its crops, on the device; the same grey levels everywhere."""
        return load_crops([self], device)[0]


@dataclass(frozen=True, eq=False)
class PictureInput:
    """A picture and its places in a prompt."""

    start: int
    """Its first place, counted in tokens."""
    tokens: int
    picture: Picture

    @property
    def key(self) -> bytes:
        """The picture's."""
        return self.picture.key

    def load(self, device: torch.device | str = "cpu") -> Crops:
        """The picture's crops."""
        return self.picture.load(device)


@dataclass(frozen=True)
class Medium:
    """What one picture, clip or document of a conversation costs."""

    kind: str
    """image, video or document."""
    pictures: int
    """1, or the frames or pages that were taken."""
    crops: int
    tokens: int
    """For its pictures; the text around them is not counted."""
    total: int | None = None
    """Pages of the whole document."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """One conversation for the engine."""

    ids: list[int]
    """Tokens of the prompt, with as many image ids at each picture's place as it has tokens."""
    pictures: list[PictureInput]
    """In the order of their places."""
    media: list[Medium] = field(default_factory=list)
    """What each part of the messages with a picture, clip or document came to, in their order."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends: the end of a turn after messages, nothing after plain text."""
    digests: dict[int, list[bytes]] = field(default_factory=dict, init=False, compare=False, repr=False)
    """By block size: digests of the prompt's blocks in an engine's cache, once the engine has made them."""


def read_pictures(
    sources: Sequence[Any],
    processor: AriaImageProcessor,
    settings: Sequence[dict[str, Any]],
    media: MediaSettings | None = None,
    budget: PixelBudget | None = None,
) -> list[Picture]:
    """:meth:`Picture.of` of several sources, each with its own settings.

    ``media`` limits what is read; None: the defaults of :class:`~aria.media.open.MediaSettings`. ``budget`` is
    what they may take together, less what was spent already.
    """
    media = media or MediaSettings()
    budget = budget or PixelBudget(media.prompt_pixels)
    progress = ProgressCounter("image", sum(not isinstance(source, ScaledImage | np.ndarray) for source in sources))
    needed = [NeededSizes(processor, **own) for own in settings]
    images = _together(lambda source, sizes: _read(source, media, budget, progress, sizes), sources, needed)
    # One digest of a picture's pieces, so that several threads can share a large picture too.
    pieces = [
        array.reshape(-1).data[at : at + PIECE_BYTES]
        for image in images
        for array in image.arrays
        for at in range(0, array.size, PIECE_BYTES)
    ]
    digests = iter(_together(lambda piece: hashlib.sha256(piece).digest(), pieces))
    pictures = []
    for image, own in zip(images, settings, strict=True):
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
            tile_plans = tuple(_drawn(sheet, page) for sheet, page in zip(tile_plans, pages, strict=True))
        else:
            pages *= len(tile_plans)
        pictures.append(Picture(pages, size, tile_plans, extents, key.digest()))
    return pictures


def _drawn(sheet: TilePlan, page: np.ndarray) -> TilePlan:
    """The sheet of a page that was brought to its size already."""
    size = page.shape[1], page.shape[0]
    return TilePlan(size, size, (0, 0), ((0, 0, *size),)) if sheet.is_whole else sheet


def load_crops(pictures: Sequence[Picture], device: torch.device | str) -> list[Crops]:
    """Crops of several pictures on the device; those of one shape travel and are resized together."""
    device = torch.device(device)
    crops: list[Crops | None] = [None] * len(pictures)
    for group in _alike(pictures):
        first, alike = pictures[group[0]], [pictures[i].pages for i in group]
        if device.type == "cpu":
            # Threads that call this beside PyTorch's own should not make it begin more of them: where there are more
            # than cores, all wait for each other asleep, and small operations take twice as long.
            stacked = _each(alike, lambda pages: np.stack(pages))
            loaded = torch.from_numpy(np.ascontiguousarray(_cut(stacked, first).transpose(0, 1, 4, 2, 3)))
        else:
            sent = _each(alike, lambda pages: _upload(pages, device))
            loaded = _cut(sent, first).permute(0, 1, 4, 2, 3)
        for i, one in zip(group, loaded.unbind(), strict=True):
            crops[i] = Crops(one, pictures[i].extents, pictures[i].key)
    return [one for one in crops if one is not None]


def _each(pictures: Sequence[Sequence[np.ndarray]], load: Callable[[Sequence[np.ndarray]], Pixels]) -> list[Pixels]:
    """What is loaded of the first pages of some pictures, of their second ones, and so on; once where these are the
    same."""
    loaded: dict[int, Pixels] = {}
    for k, page in enumerate(pictures[0]):
        if id(page) not in loaded:
            loaded[id(page)] = load([pages[k] for pages in pictures])
    return [loaded[id(page)] for page in pictures[0]]


def _read(
    source: Any, media: MediaSettings, budget: PixelBudget, progress: ProgressCounter, sizes: NeededSizes
) -> ScaledImage:
    check_cancelled()
    if isinstance(source, ScaledImage):
        return source
    # Always a copy: what the key was made from must still be there when the picture is loaded.
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


def _alike(pictures: Sequence[Picture]) -> Iterable[list[int]]:
    """Indices of pictures that become crops in the same way, in portions of :data:`UPLOAD_BYTES`."""
    groups: dict[Any, list[int]] = {}
    for i, picture in enumerate(pictures):
        shapes = [page.shape for page in picture.pages]
        shared = len({id(page) for page in picture.pages})
        groups.setdefault((*shapes, shared, picture.size, picture.tile_plans, picture.extents), []).append(i)
    for group in groups.values():
        portion = max(1, UPLOAD_BYTES // sum(page.size for page in pictures[group[0]].pages))
        yield from (group[at : at + portion] for at in range(0, len(group), portion))


def _upload(pictures: Sequence[np.ndarray], device: torch.device) -> Tensor:
    staged = torch.empty(len(pictures), *pictures[0].shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    _together(np.copyto, staged.numpy(), pictures)
    return staged.to(device, non_blocking=True)


def _together(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """Like ``map``, on several threads: decoding, fetching, hashing and copying leave the interpreter free."""
    calls = list(zip(*arguments, strict=True))
    if len(calls) < 2:
        return [function(*call) for call in calls]
    with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1, MOST_THREADS)) as pool:
        return map_in_context(pool, lambda call: function(*call), calls)


def _cut(pages: Sequence[Pixels], picture: Picture) -> Pixels:
    """Crops uint8 ``(F, C, S, S, 3)`` of pictures that are all like ``picture``; their pages are ``(F, Y, X, 3)``."""
    F, S = len(pages[0]), picture.size
    [whole] = picture.extents if len(picture.extents) == 1 else [None]
    if whole == (S, S) == pages[0].shape[1:3]:
        return pages[0][:, None]
    crops = _black(pages[0], F, len(picture.extents), S, S, 3)
    extents = iter(enumerate(picture.extents))
    for page_FYXH, sheet in zip(pages, picture.tile_plans, strict=True):
        page = _resize(page_FYXH, *sheet.drawn)
        if sheet.size != sheet.drawn:
            canvas = _black(page, F, sheet.size[1], sheet.size[0], 3)
            x, y = sheet.offset
            canvas[:, y : y + sheet.drawn[1], x : x + sheet.drawn[0]] = page
            page = canvas
        for left, top, right, low in sheet.pieces:
            i, (height, width) = next(extents)
            crops[:, i, :height, :width] = _resize(page[:, top:low, left:right], width, height)
    return crops


def _black(like: Pixels, *shape: int) -> Pixels:
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def _resize(pictures_FYXH: Pixels, width: int, height: int) -> Pixels:
    old_height, old_width = pictures_FYXH.shape[1:3]
    if (old_height, old_width) == (height, width):
        return pictures_FYXH
    if isinstance(pictures_FYXH, Tensor):
        return resize_as_pillow(pictures_FYXH, width, height)
    images = (Image.fromarray(np.ascontiguousarray(picture)) for picture in pictures_FYXH)
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images])


def resize_as_pillow(pictures_FYXH: Tensor, width: int, height: int) -> Tensor:
    """What the installed Pillow makes of the pictures, on any device."""
    old_height, old_width = pictures_FYXH.shape[1:3]
    passes = [(-2, width), (-3, height)]
    if _PILLOW_CHOOSES and height < old_height and old_height - height > 2 * (old_width - width):
        passes.reverse()
    for dim, target in passes:
        if pictures_FYXH.shape[dim] != target:
            pictures_FYXH = ops.resample(pictures_FYXH, dim, target)
    return pictures_FYXH
