"""Images, clips and documents that were let in -> RGB, decoded in worker processes or in this one.

Whoever reads says what it may take (``spend``) and at which sizes it needs the result (``sizes``), and both are asked
when a file's header has been read and nothing has been decoded.
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
from aria.media.container import DecodeRun, Fit, Keyframe, ReadDeadline, gpu_decoding
from aria.media.limits import DECODE_MEMORY, MediaSettings, PixelBudget
from aria.media.open import OpenedMedia, open_media
from aria.media.progress import Progress, report
from aria.media.video import FrameSelection, Plan
from aria.workers import LocalJob, Workers

_MOST = 1 << 24
Spend = Callable[[int], None]
"""Called with a number of pixels before they are decoded; a ValueError refuses them."""
Sizes = Callable[[int, int], Sequence[tuple[int, int]]]
"""(width, height) of an image -> those that it is needed at; none: as it is."""


class ScaledImage(NamedTuple):
    """An image at the sizes that it is needed at."""

    size: tuple[int, int]
    """(width, height) that it has itself."""
    arrays: tuple[np.ndarray, ...]
    """uint8 ``(Y, X, 3)``, one for each size that was asked for, or the image itself."""

    @classmethod
    def from_array(cls, array: np.ndarray) -> ScaledImage:
        """An image in memory, as it is."""
        return cls((array.shape[1], array.shape[0]), (array,))

    @property
    def is_scaled(self) -> bool:
        """Whether it is there at other sizes than its own."""
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
        """uint8 ``(Y, X, 3)``, upright, in the first of the sizes that were asked for."""
        return self.image.arrays[0]

    @property
    def stamp(self) -> str:
        """``MM:SS``; minutes may go beyond 59."""
        minutes, seconds = divmod(int(self.seconds), 60)
        return f"{minutes:02d}:{seconds:02d}"


class Page(NamedTuple):
    """A page of a document."""

    number: int
    """From 1."""
    image: ScaledImage
    total: int
    """Pages of the whole document."""

    @property
    def rgb(self) -> np.ndarray:
        """uint8 ``(Y, X, 3)``, in the first of the sizes that were asked for."""
        return self.image.arrays[0]


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
    loaded = convert_in_memory(source, settings)
    if loaded is not None:
        return loaded
    spend = (budget or PixelBudget(settings.prompt_pixels)).spend
    return Image.fromarray(read_image(open_media(source, "image", settings), settings, spend).arrays[0])


def convert_in_memory(source: Any, settings: MediaSettings) -> Image.Image | None:
    """An image that is already decoded as RGB (see :func:`load_image`); None for all that has to be read first."""
    if isinstance(source, Image.Image):
        return rgb.upright_rgb(source, "the picture", settings.background)
    if isinstance(source, np.ndarray):
        return rgb.from_array(source, channels_first=False, background=settings.background)
    torch = sys.modules.get("torch")  # who passes a tensor has imported it
    if torch is not None and isinstance(source, torch.Tensor):
        return rgb.from_array(rgb.tensor_to_array(source), channels_first=True, background=settings.background)
    return None


def read_image(image: OpenedMedia, settings: MediaSettings, spend: Spend, sizes: Sizes | None = None) -> ScaledImage:
    """An image file as upright RGB, by the rules of :func:`load_image`.

    Raises:
        ValueError: not an image, damaged, too large, or one that takes too long.
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
    """Frames from all over a clip.

    They are those on screen at the middles of N equal parts of its length. A clip of N frames or fewer gives each of
    them once; no frame is ever given twice. With a constant rate this is the authors' choice,
    ``trunc(T / N * (i + 0.5))`` of T frames.

    Args:
        clip: the file, as :func:`~aria.media.open.open_media` lets it in.
        num_frames: N.
        fps: instead of ``num_frames``: N as so many frames a second, at most ``max_frames``.
        max_frames: with ``fps``; None: what the settings allow.
        fit: what becomes of a frame of (width, height) while it is decoded; None: frames stay as they are.
        sizes: what becomes of it then.
        settings: limits on frames, pixels and seconds; None: those of :class:`MediaSettings`.
        spend: refuses more pixels than there may be.
        threads: decoders at work; None: as many as there are cores, or as keep a GPU's video decoder busy.

    Returns:
        Frames in the order of their times; what cannot be decoded is left out.

    Raises:
        ValueError: no clip, a damaged one, or one that goes over a limit.
    """
    settings = settings or MediaSettings()
    asked = FrameSelection(num_frames, fps, max_frames)
    asked.check(settings)
    calls = _calls(fit=fit, sizes=sizes)
    read = partial(_run, medium=clip, settings=settings, seconds=settings.decode_timeout, spend=spend, calls=calls)
    gpu = _gpu(settings.clip_decoder, clip.name)
    if gpu is None:
        frames = _frames(clip.name, *read(video.read, arguments=(asked, settings, threads)))
    else:
        plan = _parse_plan(read(video.make_plan, arguments=(asked, settings))[0], clip.name)
        frames = _decode_on_gpu(clip, plan, calls, settings, gpu, threads)
        missing = _remaining(plan, frames)
        if missing.runs or missing.animation:
            read = partial(read, spend=None)  # it was spent for the plan
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
    """Pages of a PDF, with their annotations and filled forms.

    Args:
        pdf: the file, as :func:`~aria.media.open.open_media` lets it in.
        pages: numbers from 1, as a list or as text such as ``1-3,7``, in the order wanted; None: all.
        settings: limits on pages and pixels; None: those of :class:`MediaSettings`.
        sizes: at which pages are needed.
        spend: refuses more pixels than there may be.

    Raises:
        ValueError: no PDF, a damaged or locked one, pages that it does not have, or over a limit.
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
    """Frames by time."""
    with _validated(name):
        return {
            _as_int(moment): Frame(Fraction(_as_int(above), _as_int(below)), _scaled(width, height, arrays, count))
            for moment, above, below, width, height, count in result["frames"]
        }


def _scaled(width: Any, height: Any, arrays: list[np.ndarray], count: int | None = None) -> ScaledImage:
    """An image of the first ``count`` arrays of a list, or of all, which it takes out."""
    own, arrays[:count] = tuple(arrays[:count]), []
    if not own or not all(array.ndim == 3 and array.shape[2] == 3 and array.size for array in own):
        raise ValueError("arrays that are no images")
    width, height = _checked((width, height))
    return ScaledImage((width, height), own)


_as_int = operator.index
"""A whole number that a worker returned, as it is; anything else is a TypeError."""


@contextlib.contextmanager
def _validated(name: str) -> Iterator[None]:
    """What a worker returned may be anything."""
    try:
        yield
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be read; the file may be damaged") from error


def _gpu(decoder: str, name: str) -> int | None:
    """The number of the GPU to decode on, by ``MediaSettings.clip_decoder``."""
    if decoder == "cpu" or (decoder == "auto" and not _cuda_is_used()):
        return None
    import torch

    if decoder == "auto":
        gpu = max(range(torch.cuda.device_count()), key=torch.cuda.memory_allocated)
        return gpu if _gpu_decodes(gpu) else None
    gpu = torch.device(decoder).index or 0
    if gpu >= torch.cuda.device_count() or not _gpu_decodes(gpu):
        raise ValueError(f"{name} cannot be decoded on {decoder}: no video decoder is found there; use cpu or auto")
    return gpu


def _cuda_is_used() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


@cache
def _gpu_decodes(gpu: int) -> bool:
    """Whether a GPU's video decoder can be used: a driver may come without it, so a picture is tried."""
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


def _parse_plan(value: Any, name: str) -> Plan:
    """A plan that a worker made; what lies in it may be anything."""
    with _validated(name):
        (width, height), first, (above, below), untimed, animation, chosen, runs = value
        return Plan(
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
    plan: Plan,
    calls: dict[str, Callable[..., Any]],
    settings: MediaSettings,
    gpu: int,
    threads: int | None,
) -> dict[int, Frame]:
    """Frames by time that a GPU's video decoder gives. Its driver works for this process alone, which therefore reads
    the file once more: a worker has been through it without harm."""
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
        return {}  # a codec that it does not have
    frames = {}
    for moment, pixels in decoded.items():
        height, width = pixels.shape[:2]
        sizes = calls["sizes"](width, height)
        arrays = rgb.resize_to(Image.fromarray(pixels), sizes) if sizes else [pixels]
        frames[moment] = Frame((moment - plan.first) * plan.unit, ScaledImage((width, height), tuple(arrays)))
    return frames


def _remaining(plan: Plan, frames: Container[int]) -> Plan:
    """What is left of a plan when some times are decoded."""
    runs = [run._replace(times=[moment for moment in run.times if moment not in frames]) for run in plan.runs]
    return plan._replace(runs=[run for run in runs if run.times])


def _calls(fit: Fit | None = None, sizes: Sizes | None = None) -> dict[str, Callable[..., Any]]:
    """The functions that readers call. A reader may be in the hands of whoever made its file, and ask for anything."""

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
    if len(values) != 2 or not all(type(value) is int and least <= value <= _MOST for value in values):
        raise ValueError(f"expected two numbers from {least} to {_MOST}, but got {values!r:.50}")
    return values


def _run(
    function: Callable[..., Any],
    medium: OpenedMedia,
    settings: MediaSettings,
    seconds: float,
    arguments: Sequence[Any],
    spend: Spend | None,
    calls: dict[str, Callable[..., Any]],
) -> tuple[Any, list[np.ndarray]]:
    """What a reader makes of a file, in a worker or here; what it takes of the memory of all is given back."""
    taken = 0

    def take(pixels: int, nbytes: int, *size: int) -> Any:
        nonlocal taken, spend
        if not all(type(value) is int and 0 <= value < 1 << 60 for value in (pixels, nbytes)):
            raise ValueError(f"expected numbers of pixels and bytes, but got {pixels!r:.50} and {nbytes!r:.50}")
        if spend is not None:
            spend(pixels)
            spend = None  # once, however often it is asked until there is memory
        DECODE_MEMORY.reserve(nbytes, settings.decoded_bytes)
        taken += nbytes
        return calls["sizes"](*size) if size else None

    calls = {**calls, "take": take}
    arrays: list[np.ndarray] = []
    try:
        workers = shared_workers(settings)
        if workers is not None:
            result, arrays = workers.run(
                function, medium.name, *arguments, name=medium.name, seconds=seconds, files=[medium.source], calls=calls
            )
        else:
            job = LocalJob([medium.source], calls)
            result = function(job, medium.name, *arguments)
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
    os.register_at_fork(after_in_child=_WORKERS.clear)  # they talk to the process that started them


def shared_workers(settings: MediaSettings) -> Workers | None:
    """The worker processes that all who read with such settings share; None: this process decodes."""
    key = settings.worker_count, settings.worker_bytes
    if not settings.worker_count:
        return None
    with _WORKERS_LOCK:
        if key not in _WORKERS:
            _WORKERS[key] = Workers(*key)
        return _WORKERS[key]


@atexit.register
def close_workers() -> None:
    """End all worker processes; later readers start new ones."""
    with _WORKERS_LOCK:
        workers = [*_WORKERS.values()]
        _WORKERS.clear()
    for one in workers:
        one.close()
