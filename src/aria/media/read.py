"""Decode opened images, clips and documents to RGB, in worker processes or in this process.

Callers pass a pixel budget (``spend``) and the target sizes (``sizes``). Both are called after a file's header has been
read and before anything is decoded.
"""

from __future__ import annotations

import atexit
import contextlib
import operator
import os
import sys
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from fractions import Fraction
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from aria.media import document, rgb, video
from aria.media.budgets import DECODE_MEMORY, PixelBudget
from aria.media.container import DecodeRun, Fit, Keyframe, ReadDeadline, gpu_decoding
from aria.media.limits import MediaSettings
from aria.media.open import OpenedMedia, open_media
from aria.media.progress import Progress, report
from aria.media.video import DecodePlan, FrameSelection
from aria.workers import LocalJob, Workers

_MAX_VALUE = 1 << 24
Spend = Callable[[int], None]
"""Called with a number of pixels before they are decoded; raises ValueError to refuse them."""
Sizes = Callable[[int, int], Sequence[tuple[int, int]]]
"""Maps the (width, height) of an image to the sizes needed; an empty list means the original size."""


class ScaledImage(NamedTuple):
    """An image at one or several sizes."""

    size: tuple[int, int]
    """Original (width, height)."""
    arrays: tuple[np.ndarray, ...]
    """uint8 ``(Y, X, 3)``, one per requested size, or one at the original size."""

    @classmethod
    def from_array(cls, array: np.ndarray) -> ScaledImage:
        """Wrap an image in memory at its original size."""
        return cls((array.shape[1], array.shape[0]), (array,))

    @property
    def is_scaled(self) -> bool:
        """Whether the arrays have other sizes than the original."""
        return len(self.arrays) > 1 or self.arrays[0].shape[1::-1] != self.size

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Frame(NamedTuple):
    """A frame of a clip."""

    seconds: Fraction
    """Since the clip's first frame."""
    image: ScaledImage

    @property
    def rgb(self) -> np.ndarray:
        """uint8 ``(Y, X, 3)``, upright, in the first of the requested sizes."""
        return self.image.arrays[0]

    @property
    def stamp(self) -> str:
        """Timestamp as ``MM:SS``; minutes may exceed 59."""
        minutes, seconds = divmod(int(self.seconds), 60)
        return f"{minutes:02d}:{seconds:02d}"


class Page(NamedTuple):
    """A page of a document."""

    number: int
    """From 1."""
    image: ScaledImage
    total: int
    """Number of pages in the document."""

    @property
    def rgb(self) -> np.ndarray:
        """uint8 ``(Y, X, 3)``, in the first of the requested sizes."""
        return self.image.arrays[0]


def load_image(source: Any, settings: MediaSettings | None = None, budget: PixelBudget | None = None) -> Image.Image:
    """Load any image as an upright RGB ``PIL.Image``.

    Rules:
        * EXIF orientation is applied. Of an animation the first frame is used (of a PIL object its current frame).
        * Transparent pixels are composited on ``settings.background``, white by default. With ``background=None``
          they keep their stored colours, often black, as in transformers.
        * 16-bit grey is scaled to 8 bits, never clipped.
        * Arrays are ``(H, W)`` grey, ``(H, W, C)`` or ``(C, H, W)`` with C = 1, 3 or 4. If both readings are possible,
          NumPy arrays are read as channels last and torch tensors as channels first. uint8 is used as is, bool is black
          and white, uint16 is scaled, and floating-point values must be in 0..1.

    Args:
        source: A ``PIL.Image.Image``, NumPy array, torch tensor, path (str or Path), bytes, ``data:`` URI, or an
            ``http://`` or ``https://`` address.
        settings: Limits and permissions; None: the defaults of :class:`MediaSettings`.
        budget: Pixel budget shared with other media. Images in memory do not count.

    Raises:
        FileNotFoundError: There is no file at the path.
        ValueError: Not an image, damaged, too large, or an address that is not allowed or does not respond.
        TypeError: ``source`` has an unsupported type.
    """
    settings = settings or MediaSettings()
    loaded = convert_in_memory(source, settings)
    if loaded is not None:
        return loaded
    spend = (budget or PixelBudget(settings.prompt_pixels)).spend
    return Image.fromarray(read_image(open_media(source, "image", settings), settings, spend).arrays[0])


def convert_in_memory(source: Any, settings: MediaSettings) -> Image.Image | None:
    """Convert an image in memory (PIL, array, tensor) to RGB; None for anything that must be read first."""
    if isinstance(source, Image.Image):
        return rgb.upright_rgb(source, "the image", settings.background)
    if isinstance(source, np.ndarray):
        return rgb.from_array(source, channels_first=False, background=settings.background)
    torch = sys.modules.get("torch")  # imported already if the source is a tensor
    if torch is not None and isinstance(source, torch.Tensor):
        return rgb.from_array(rgb.tensor_to_array(source), channels_first=True, background=settings.background)
    return None


def read_image(image: OpenedMedia, settings: MediaSettings, spend: Spend, sizes: Sizes | None = None) -> ScaledImage:
    """Read an image file as upright RGB, by the rules of :func:`load_image`.

    Raises:
        ValueError: Not an image, damaged, too large, or too slow to decode.
    """
    seconds = settings.image_timeout
    result, arrays = _run(rgb.read, image, settings, seconds, (settings,), spend, _calls(sizes=sizes))
    with _validated(image.name):
        width, height = result["size"]
        return _scaled(width, height, arrays)


def read_clip(
    clip: OpenedMedia,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    fit: Fit | None = None,
    sizes: Sizes | None = None,
    settings: MediaSettings | None = None,
    spend: Spend | None = None,
    threads: int | None = None,
) -> list[Frame]:
    """Sample N frames evenly from a clip.

    The duration is divided into N equal parts, and the frame on screen in the middle of each part is taken. A clip with
    N frames or fewer yields every frame once; no frame is repeated. At a constant frame rate these are the frames
    ``trunc(T / N * (i + 0.5))`` of T, as in the authors' code.

    Args:
        clip: The opened file.
        num_frames: N.
        fps: Instead of ``num_frames``: sample this many frames per second, at most ``max_frames``.
        max_frames: Limit for ``fps``; None: the limit of the settings.
        fit: Maps the (width, height) of a frame to the size to decode it at; None: the original size.
        sizes: Maps that size to the sizes needed.
        settings: Limits on frames, pixels and duration; None: the defaults of :class:`MediaSettings`.
        spend: Called with the number of pixels before they are decoded.
        threads: Number of decoder threads; None: one per core, or as many as keep the video decoder of a GPU busy.

    Returns:
        Frames in order of time. Frames that cannot be decoded are left out.

    Raises:
        ValueError: Not a clip, damaged, or over a limit.
    """
    settings = settings or MediaSettings()
    asked = FrameSelection(num_frames, fps, max_frames)
    asked.check(settings)
    calls = _calls(fit=fit, sizes=sizes)
    read = partial(_run, media=clip, settings=settings, seconds=settings.decode_timeout, spend=spend, calls=calls)
    gpu = _decoding_gpu(settings.clip_decoder, clip.name)
    if gpu is None:
        frames = _frames(clip.name, *read(video.read, arguments=(asked, settings, threads)))
    else:
        plan = _parse_plan(read(video.make_plan, arguments=(asked, settings))[0], clip.name)
        frames = _decode_on_gpu(clip, plan, calls, settings, gpu, threads)
        missing = _remaining(plan, frames)
        if missing.runs or missing.animation:
            read = partial(read, spend=None)  # already counted for the plan
            frames |= _frames(clip.name, *read(video.read_planned, arguments=(missing, settings)))
    if not frames:
        raise ValueError(f"no frame of {clip.name} can be decoded; the file may be truncated or damaged")
    return [frames[moment] for moment in sorted(frames)]


def read_document(
    pdf: OpenedMedia,
    pages: str | Sequence[int] | None = None,
    settings: MediaSettings | None = None,
    *,
    sizes: Sizes | None = None,
    spend: Spend | None = None,
) -> list[Page]:
    """Render pages of a PDF, with annotations and form fields.

    Args:
        pdf: The opened file.
        pages: Page numbers from 1, as a list or as text such as ``1-3,7``, in the order wanted; None: all.
        settings: Limits on pages and pixels; None: the defaults of :class:`MediaSettings`.
        sizes: Maps the size of a page to the sizes needed.
        spend: Called with the number of pixels before they are rendered.

    Raises:
        ValueError: Not a PDF, damaged or encrypted, no such page, or over a limit.
    """
    settings = settings or MediaSettings()
    arguments = (pages, settings)
    result, arrays = _run(document.read, pdf, settings, settings.decode_timeout, arguments, spend, _calls(sizes=sizes))
    with _validated(pdf.name):
        return [
            Page(_as_int(number), _scaled(width, height, arrays, count), _as_int(result["pages"]))
            for number, width, height, count in result["read"]
        ]


def _frames(name: str, result: dict[str, Any], arrays: list[np.ndarray]) -> dict[int, Frame]:
    """Parse a worker's result: frames by time."""
    with _validated(name):
        return {
            _as_int(moment): Frame(Fraction(_as_int(above), _as_int(below)), _scaled(width, height, arrays, count))
            for moment, above, below, width, height, count in result["frames"]
        }


def _scaled(width: Any, height: Any, arrays: list[np.ndarray], count: int | None = None) -> ScaledImage:
    """Make an image of the first ``count`` arrays of a list (None: all), and remove them from the list."""
    own, arrays[:count] = tuple(arrays[:count]), []
    if not own or not all(array.ndim == 3 and array.shape[2] == 3 and array.size for array in own):
        raise ValueError("arrays that are not images")
    width, height = _checked((width, height))
    return ScaledImage((width, height), own)


_as_int = operator.index
"""Return an integer unchanged; raise TypeError for anything else that a worker sends."""


@contextlib.contextmanager
def _validated(name: str) -> Iterator[None]:
    """Turn errors from parsing a worker's result, which is untrusted, into a ValueError."""
    try:
        yield
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be read; the file may be damaged") from error


def _decoding_gpu(decoder: str, name: str) -> int | None:
    """The index of the GPU to decode on by ``MediaSettings.clip_decoder``; None: the CPU."""
    if decoder == "cpu" or (decoder == "auto" and not _cuda_is_used()):
        return None
    import torch

    if decoder == "auto":
        gpu = max(range(torch.cuda.device_count()), key=torch.cuda.memory_allocated)
        return gpu if _gpu_decodes(gpu) else None
    gpu = torch.device(decoder).index or 0
    if gpu >= torch.cuda.device_count() or not _gpu_decodes(gpu):
        raise ValueError(f"{name} cannot be decoded on {decoder}: it has no usable video decoder; use cpu or auto")
    return gpu


def _cuda_is_used() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


@cache
def _gpu_decodes(gpu: int) -> bool:
    """Whether the video decoder of a GPU works. Drivers may lack it, so a frame is decoded as a test."""
    import av
    from av.codec import CodecContext

    try:
        coder = CodecContext.create("libx264", "w")
        assert isinstance(coder, av.VideoCodecContext)
        coder.width = coder.height = 128
        coder.pix_fmt, coder.time_base = "yuv420p", Fraction(1, 25)
        packets = [*coder.encode(av.VideoFrame(128, 128, "yuv420p")), *coder.encode(None)]
        decoder = CodecContext.create("h264", "r", hwaccel=gpu_decoding(gpu))
        frames = [frame for packet in (*packets, None) for frame in decoder.decode(packet)]
        return bool(frames) and all(frame.format.name == "cuda" for frame in frames)
    except (av.FFmpegError, NotImplementedError, RuntimeError):
        return False


def _parse_plan(value: Any, name: str) -> DecodePlan:
    """Parse a plan that a worker made, which is untrusted."""
    with _validated(name):
        (width, height), first, (above, below), untimed, animation, chosen, runs = value
        return DecodePlan(
            (_as_int(width), _as_int(height)),
            _as_int(first),
            Fraction(_as_int(above), _as_int(below)),
            bool(untimed),
            None if animation is None else str(animation),
            {_as_int(number): _as_int(moment) for number, moment in chosen},
            [
                DecodeRun(
                    _as_int(key), {_as_int(number): _key(*one) for number, one in keys}, list(map(_as_int, times))
                )
                for key, keys, times in runs
            ],
        )


def _key(number: Any, *times: Any) -> Keyframe:
    return Keyframe(_as_int(number), *(None if moment is None else _as_int(moment) for moment in times))


def _decode_on_gpu(
    clip: OpenedMedia,
    plan: DecodePlan,
    calls: dict[str, Callable[..., Any]],
    settings: MediaSettings,
    gpu: int,
    threads: int | None,
) -> dict[int, Frame]:
    """Decode frames with the video decoder of a GPU; frames by time.

    The driver works in this process, which therefore reads the file itself, after a worker has scanned it safely.
    """
    if plan.animation is not None:
        return {}
    deadline = ReadDeadline(clip.name, settings.decode_timeout)

    def fit(width: int, height: int) -> tuple[int, int]:
        width, height = calls["fit"](width, height)
        return width, height

    try:
        decoded = video.decode(clip, plan, fit, settings, deadline, threads=threads, gpu=gpu)
    except (ValueError, LookupError, NotImplementedError, RuntimeError):
        if deadline.is_over:
            raise
        return {}  # unsupported codec
    frames = {}
    for moment, pixels in decoded.items():
        height, width = pixels.shape[:2]
        sizes = calls["sizes"](width, height)
        arrays = rgb.resize_to(Image.fromarray(pixels), sizes) if sizes else [pixels]
        frames[moment] = Frame((moment - plan.first) * plan.unit, ScaledImage((width, height), tuple(arrays)))
    return frames


def _remaining(plan: DecodePlan, frames: Container[int]) -> DecodePlan:
    """The part of a plan that is not decoded yet."""
    runs = [run._replace(times=[moment for moment in run.times if moment not in frames]) for run in plan.runs]
    return plan._replace(runs=[run for run in runs if run.times])


def _calls(fit: Fit | None = None, sizes: Sizes | None = None) -> dict[str, Callable[..., Any]]:
    """The callbacks of a reading job. A compromised worker may call them with any arguments."""

    def fitted(*size: Any) -> list[int]:
        width, height = _checked(size)
        return list(fit(width, height) if fit else (width, height))

    def needed(*size: Any) -> list[list[int]]:
        width, height = _checked(size)
        return [list(one) for one in (sizes(width, height) if sizes else ())]

    def reported(kind: Any, done: Any, total: Any) -> None:
        report(Progress(str(kind), *_checked((done, total), least=0)))

    return {"fit": fitted, "sizes": needed, "progress": reported}


def _checked(values: Sequence[Any], *, least: int = 1) -> Sequence[int]:
    if len(values) != 2 or not all(type(value) is int and least <= value <= _MAX_VALUE for value in values):
        raise ValueError(f"expected two numbers from {least} to {_MAX_VALUE}, but got {values!r:.50}")
    return values


def _run(
    function: Callable[..., Any],
    media: OpenedMedia,
    settings: MediaSettings,
    seconds: float,
    arguments: Sequence[Any],
    spend: Spend | None,
    calls: dict[str, Callable[..., Any]],
) -> tuple[Any, list[np.ndarray]]:
    """Run a reading job in a worker or in this process; memory that its results do not use is released."""
    taken = 0

    def take(pixels: int, nbytes: int, *size: int) -> Any:
        nonlocal taken, spend
        if not all(type(value) is int and 0 <= value < 1 << 60 for value in (pixels, nbytes)):
            raise ValueError(f"expected pixel and byte counts, but got {pixels!r:.50} and {nbytes!r:.50}")
        if spend is not None:
            spend(pixels)
            spend = None  # count once, even if waiting for memory repeats the call
        DECODE_MEMORY.reserve(nbytes, settings.decoded_bytes)
        taken += nbytes
        return calls["sizes"](*size) if size else None

    calls = {**calls, "take": take}
    arrays: list[np.ndarray] = []
    try:
        workers = shared_workers(settings)
        if workers is not None:
            result, arrays = workers.run(
                function, media.name, *arguments, name=media.name, seconds=seconds, files=[media.source], calls=calls
            )
        else:
            job = LocalJob([media.source], calls)
            result = function(job, media.name, *arguments)
            arrays = job.arrays
        return result, arrays
    finally:
        kept = sum(array.nbytes for array in arrays)
        DECODE_MEMORY.release(taken - kept)
        for array in arrays:
            DECODE_MEMORY.track(array)


_WORKERS: dict[tuple[int, int], Workers] = {}
_WORKERS_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WORKERS.clear)  # they belong to the parent process


def shared_workers(settings: MediaSettings) -> Workers | None:
    """The worker pool shared by all callers with the same settings; None: decode in this process."""
    key = settings.worker_count, settings.worker_bytes
    if not settings.worker_count:
        return None
    with _WORKERS_LOCK:
        if key not in _WORKERS:
            _WORKERS[key] = Workers(*key)
        return _WORKERS[key]


@atexit.register
def close_workers() -> None:
    """End all worker processes. Later reads start new ones."""
    with _WORKERS_LOCK:
        workers = [*_WORKERS.values()]
        _WORKERS.clear()
    for one in workers:
        one.close()
