"""Expand clips and documents in a prompt into their frames and pages, with the text around each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from aria.media.budgets import PixelBudget
from aria.media.cache import MediaCache
from aria.media.limits import MediaSettings
from aria.media.open import open_media
from aria.media.read import Frame, Page, ScaledImage, read_clip, read_document
from aria.processor.chat import IMAGE_TOKEN, IMAGE_WRAPPING, DocumentPart, ImagePart, MediaPart, Prompt, VideoPart
from aria.processor.image import AriaImageProcessor, NeededSizes

NUM_FRAMES = 128
"""Default number of frames of a clip, as in the authors' cookbook."""


Needed = Callable[[MediaPart], NeededSizes]
Read = TypeVar("Read", Frame, Page)


class MediaOrigin(NamedTuple):
    """The media part that some images of a prompt come from."""

    kind: str
    """"image", "video" or "document"."""
    images: int
    """Number of images."""
    total: int | None
    """Number of pages in the document."""


class Expanded(NamedTuple):
    """A prompt whose slots are all for images."""

    prompt: Prompt
    media: list[MediaOrigin]
    """The media parts, in order."""


class _Place(NamedTuple):
    """An image and the text around it."""

    before: str
    part: ImagePart
    after: str
    total: int | None = None
    """Number of pages in the document."""


def resolve_defaults(
    prompt: Prompt, processor: AriaImageProcessor, *, max_image_size: int | None = None, split_image: bool | None = None
) -> Prompt:
    """Decide crop size and splitting for every part of a prompt.

    The settings of a part take precedence, then the arguments, then the defaults of its kind: the processor's settings
    for images, the smallest crops without splitting for clips, splitting for documents.
    """
    defaults: dict[type[MediaPart], tuple[int, bool]] = {
        ImagePart: (processor.max_image_size, processor.split_image),
        VideoPart: (processor.sizes[0], False),
        DocumentPart: (processor.max_image_size, True),
    }
    parts = []
    for part in prompt.parts:
        size, split = defaults[type(part)]
        size = size if max_image_size is None else max_image_size
        split = split if split_image is None else split_image
        parts.append(
            replace(
                part,
                max_image_size=size if part.max_image_size is None else part.max_image_size,
                split_image=split if part.split_image is None else part.split_image,
            )
        )
    return prompt.with_parts(parts)


def expand(
    prompt: Prompt,
    processor: AriaImageProcessor,
    settings: MediaSettings,
    cache: MediaCache | None = None,
    budget: PixelBudget | None = None,
    needed: Needed | None = None,
) -> Expanded:
    """Replace the clips and documents of a prompt by their frames and pages.

    The prompt went through :func:`resolve_defaults`, and all of its parts have sources.

    Each frame becomes ``[MM:SS]``, image, newline; without timestamps all frames follow each other, with one newline at
    the end. Each page becomes ``Page N: ``, image, newline. Media in ``cache`` are not read again. Frames and pages are
    counted against ``budget`` before they are decoded.

    ``needed`` returns the sizes from which the crops of a clip or document are made. With it the sources of the parts
    for frames and pages are :class:`~aria.media.read.ScaledImage`, without it arrays.

    Raises:
        FileNotFoundError, TypeError, ValueError: A media file cannot be read, see :mod:`aria.media.open`.
    """
    at = 0
    pieces: list[str] = []
    media: list[MediaOrigin] = []
    whole = str(prompt)
    cache = cache or MediaCache()
    budget = budget or PixelBudget(settings.prompt_pixels)
    for slot, part in zip(prompt.slots, prompt.parts, strict=True):
        start, end = slot, slot + len(IMAGE_TOKEN)
        if whole.endswith(IMAGE_WRAPPING[0], at, start) and whole.startswith(IMAGE_WRAPPING[1], end):
            start, end = start - len(IMAGE_WRAPPING[0]), end + len(IMAGE_WRAPPING[1])
        place = prompt[start:end]
        assert isinstance(place, Prompt), "a slice of a prompt is one"
        pieces.append(prompt[at:start])
        places = list(_open(part, _Reader(processor, settings, cache, budget, needed)))
        for before, image, after, _ in places:
            pieces += (before, place.with_parts([image]), after)
        media.append(MediaOrigin(_kind(part), len(places), places[0].total if places else None))
        at = end
    return Expanded(Prompt.concat([*pieces, prompt[at:]]), media)


def _kind(part: MediaPart) -> str:
    return {VideoPart: "video", DocumentPart: "document"}.get(type(part), "image")


class _Reader(NamedTuple):
    """The settings and resources for reading clips and documents."""

    processor: AriaImageProcessor
    settings: MediaSettings
    cache: MediaCache
    budget: PixelBudget
    needed: Needed | None

    def read(self, key: tuple[object, ...], part: MediaPart, read: Callable[..., Sequence[Read]]) -> Sequence[Read]:
        """Return the images of a clip or document from the cache, or by calling ``read(spend=..., sizes=...)``."""
        spent = False

        def spend(pixels: int) -> None:
            nonlocal spent
            self.budget.spend(pixels)
            spent = True

        sizes = self.needed(part) if self.needed else None
        key = (*key, sizes and sizes.key, self.settings)
        images = self.cache.get(key, lambda: read(spend=spend, sizes=sizes), self.settings.cache_bytes)
        if not spent:
            self.budget.spend(sum(image.image.size[0] * image.image.size[1] for image in images))
        return images

    def image(self, image: ScaledImage, part: MediaPart) -> ImagePart:
        """Make an image part of a frame or page."""
        return ImagePart(image if self.needed else image.arrays[0], part.max_image_size, part.split_image)


def _open(part: MediaPart, reader: _Reader) -> Iterator[_Place]:
    if isinstance(part, ImagePart):
        yield _Place("", part, "")
    elif isinstance(part, VideoPart):
        yield from _frames(part, reader)
    else:
        assert isinstance(part, DocumentPart), f"a part of an unknown kind: {part!r:.100}"
        pdf, pages = open_media(part.source, "document", reader.settings), part.pages
        key = (pdf.identity(), "pages", pages if pages is None or isinstance(pages, str) else tuple(pages))
        for page in reader.read(key, part, partial(read_document, pdf, pages, reader.settings)):
            yield _Place(f"Page {page.number}: ", reader.image(page.image, part), "\n", page.total)


def _frames(part: VideoPart, reader: _Reader) -> Iterator[_Place]:
    size, split = part.max_image_size, part.split_image
    processor, settings = reader.processor, reader.settings
    assert size is not None, "expand takes prompts that are resolved"

    def fit(width: int, height: int) -> tuple[int, int]:
        # Decode at the size of the crop, so that full frames are never in memory. Smaller ones are scaled up later.
        return (width, height) if split or max(width, height) <= size else processor.fit((width, height), size)

    num_frames = part.num_frames or (min(NUM_FRAMES, settings.max_frames) if part.fps is None else None)
    asked: dict[str, Any] = {"num_frames": num_frames, "fps": part.fps, "max_frames": part.max_frames}
    clip = open_media(part.source, "video", settings)
    key = (clip.identity(), *asked.values(), None if split else (size, processor.min_image_size))
    frames = reader.read(key, part, partial(read_clip, clip, **asked, fit=fit, settings=settings))
    for i, frame in enumerate(frames):
        last = i == len(frames) - 1
        before = f"[{frame.stamp}]" if part.timestamps else ""
        yield _Place(before, reader.image(frame.image, part), "\n" if part.timestamps or last else "")
