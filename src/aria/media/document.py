"""Render PDF pages at 144 dots per inch (twice their nominal size), as the authors do."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from aria.media.container import MediaFile, ReadDeadline
from aria.media.limits import JobFile, MediaSettings
from aria.media.progress import ProgressCounter, forward_progress
from aria.media.rgb import write_sizes

SCALE = 2
"""Pixels per point (1/72 inch)."""
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")
# PDFium has process-wide state.
_PDFIUM = threading.Lock()
_DRAWING_BYTES = 16
"""Memory per pixel while a page is rendered and resized."""
_SLICE = 0.2
"""Seconds of rendering after which other documents get a turn."""
_UNSET = 2
"""PDFium's error code for a missing file, which cannot occur: set beforehand, to detect whether it is overwritten."""
_FAULTS: dict[int | None, str] = {
    _UNSET: "it has no pages",
    3: "it is not a PDF, is damaged, or has no pages",
    4: "it is encrypted with a password",
    5: "its encryption is not supported",
}


def read(job: Any, name: str, pages: str | Sequence[int] | None, settings: MediaSettings) -> dict[str, Any]:
    """Job: render pages of a PDF, with annotations and form fields.

    Calls ``sizes(width, height)`` for each page, and ``take(pixels, bytes)`` before rendering. The result has the
    number of pages of the document, and ``(number, width, height, number of arrays)`` for each requested page, whose
    arrays are ``(height, width, 3)``.

    Args:
        job: See :class:`aria.workers.child.Job`.
        name: Name of the file for error messages.
        pages: Page numbers from 1, as a list or as text such as ``1-3,7``, in the order wanted; None: all.
        settings: Limits on pages, pixels and time.

    Raises:
        ValueError: Not a PDF, damaged or encrypted, no such page, or over a limit.
    """
    forward_progress(job)
    deadline = ReadDeadline.for_job(job, name, settings.decode_timeout)
    with _opened(JobFile(job, name)) as pdf:
        with _PDFIUM:
            count = len(pdf)
        if not count:
            raise ValueError(f"{name} has no pages")
        ranges = [(1, count)] if pages is None else page_ranges(pages, count)
        asked = sum(last - first + 1 for first, last in ranges)
        if asked > settings.max_pages:
            raise ValueError(
                f"{asked} pages of {name} are requested, but {settings.max_pages} are allowed; "
                'choose some, such as pages="1-8"'
            )
        numbers = [number for first, last in ranges for number in range(first, last + 1)]
        plans = []
        for number in numbers:
            deadline.check()
            size = _size(pdf, number, name, settings.page_pixels)
            plans.append((number, size, job.call("sizes", *size)))
        _reserve(job, plans)
        progress = ProgressCounter("document", asked)
        read = []
        for number, (width, height), sizes in plans:
            deadline.check()
            pixels = _render(pdf, number, (width, height), name, deadline)
            read.append((number, width, height, write_sizes(job, Image.fromarray(pixels), sizes)))
            progress.add()
        return {"pages": count, "read": read}


def _reserve(job: Any, plans: Sequence[tuple[int, tuple[int, int], list[tuple[int, int]]]]) -> None:
    """Reserve the pixels of all pages, and memory for the results and for rendering the largest page."""
    pixels = sum(width * height for _, (width, height), _ in plans)
    kept = sum(width * height for _, size, sizes in plans for width, height in sizes or [size])
    drawn = max(width * height for _, (width, height), _ in plans)
    job.call("take", pixels, 3 * kept + _DRAWING_BYTES * drawn)


def page_ranges(pages: str | Sequence[int], count: int) -> list[tuple[int, int]]:
    """Parse page numbers such as ``1-3,7`` or a list, for a document of ``count`` pages, into (first, last) ranges.

    Raises:
        ValueError: Malformed, or pages that do not exist.
    """
    if isinstance(pages, str):
        ranges = []
        for part in pages.split(","):
            match = _RANGE.fullmatch(part)
            if match is None:
                raise ValueError(f'pages is {pages!r:.60}; expected numbers and ranges such as "1-3,7"')
            ranges.append((int(match[1]), int(match[2] or match[1])))
    elif isinstance(pages, Iterable) and all(isinstance(number, int) for number in pages):
        ranges = [(number, number) for number in pages]
    else:
        raise ValueError(f'pages is {pages!r:.60}; expected whole numbers in a list, or text such as "1-3,7"')
    for first, last in ranges:
        if not 1 <= first <= last <= count:
            asked = f"page {first}" if first == last else f"pages {first}-{last}"
            raise ValueError(f"{asked} requested, but the document has pages 1 to {count}")
    if not ranges:
        raise ValueError("pages is empty; leave it out for all of them")
    return ranges


@contextlib.contextmanager
def _opened(document: MediaFile) -> Iterator[Any]:
    import pypdfium2

    with contextlib.ExitStack() as opened:
        with _readable_errors(f"{document.name}, as a document,"), _PDFIUM:
            # A document without pages fails to load without setting an error code, which would be that of an earlier
            # failure.
            pypdfium2.raw.FPDF_LoadDocument(b"", None)
            assert pypdfium2.raw.FPDF_GetLastError() == _UNSET, "PDFium no longer reports a missing file by this code"
            pdf = pypdfium2.PdfDocument(opened.enter_context(document.file()))
        opened.enter_context(_closing(pdf))
        with _PDFIUM:
            if _is_dynamic_form(pdf):
                raise ValueError(
                    f"{document.name} is a dynamic XFA form, whose pages only Adobe's programs can render; print it to "
                    "a PDF there and send that"
                )
            pdf.init_forms()
        yield pdf


def _is_dynamic_form(pdf: Any) -> bool:
    """Whether the only page is a placeholder for a dynamic XFA form. Static XFA forms have normal pages with fields."""
    from pypdfium2 import raw

    if raw.FPDF_GetXFAPacketCount(pdf) < 1:  # the form was emptied by another program
        return False
    kind = pdf.get_formtype()
    if kind != raw.FORMTYPE_XFA_FOREGROUND or len(pdf) != 1:
        return bool(kind == raw.FORMTYPE_XFA_FULL)
    page = pdf[0]
    try:
        return bool(raw.FPDFPage_GetAnnotCount(page) == 0)
    finally:
        page.close()


def _size(pdf: Any, number: int, name: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) in pixels of a rendered page, without reading its content."""
    from pypdfium2 import raw

    size = raw.FS_SIZEF()
    with _PDFIUM:
        known = raw.FPDF_GetPageSizeByIndexF(pdf, number - 1, size)
    if not known:
        raise ValueError(f"page {number} of {name} cannot be read: it is missing or damaged; exclude it with pages=")
    width, height = (math.ceil(side * SCALE) for side in (size.width, size.height))
    if not width or not height:
        raise ValueError(f"page {number} of {name} has no area ({width} x {height} pixels); exclude it with pages=")
    if width * height > max_pixels:
        raise ValueError(
            f"page {number} of {name} would be {width} x {height} pixels, more than the {max_pixels:,} "
            "allowed; make it smaller, or exclude it with pages="
        )
    return width, height


def _render(pdf: Any, number: int, size: tuple[int, int], name: str, deadline: ReadDeadline) -> np.ndarray:
    import pypdfium2

    width, height = size
    with contextlib.ExitStack() as opened, _readable_errors(f"page {number} of {name}", "; exclude it with pages="):
        with _PDFIUM:
            page = opened.enter_context(_closing(pdf[number - 1]))
            bitmap = pypdfium2.PdfBitmap.new_native(
                width, height, format=pypdfium2.raw.FPDFBitmap_BGR, rev_byteorder=True
            )
            opened.enter_context(_closing(bitmap))
            bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        _draw(pdf, page, bitmap, deadline)
        # Copy: the memory of the bitmap belongs to PDFium.
        return np.array(bitmap.to_numpy(), order="C")


def _draw(pdf: Any, page: Any, bitmap: Any, deadline: ReadDeadline) -> None:
    """Render a page onto a bitmap of its size, in slices of time.

    A page of a few kilobytes can take hours. Between slices other documents get their turn, and the deadline is
    checked.
    """
    from pypdfium2 import PdfiumError, raw

    end = 0.0
    pause = raw.IFSDK_PAUSE(version=1)
    pause.NeedToPauseNow = type(pause.NeedToPauseNow)(lambda _: time.monotonic() > end)
    flags = raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER
    place = (bitmap, page, 0, 0, bitmap.width, bitmap.height, 0, flags)
    step = partial(raw.FPDF_RenderPageBitmap_Start, *place, pause)
    try:
        while True:
            with _PDFIUM:
                end = time.monotonic() + _SLICE
                status = step()
            if status != raw.FPDF_RENDER_TOBECONTINUED:
                break
            deadline.check()
            time.sleep(0.001)  # otherwise waiters would rarely get the lock
            step = partial(raw.FPDF_RenderPage_Continue, page, pause)
    finally:
        with _PDFIUM:
            raw.FPDF_RenderPage_Close(page)
    if status != raw.FPDF_RENDER_DONE:
        raise PdfiumError("rendering failed")
    if pdf.formenv:
        with _PDFIUM:
            raw.FPDF_FFLDraw(pdf.formenv, *place)


@contextlib.contextmanager
def _closing(thing: Any) -> Iterator[Any]:
    try:
        yield thing
    finally:
        with _PDFIUM:
            thing.close()


@contextlib.contextmanager
def _readable_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn PDFium errors into ValueErrors that say what cannot be read."""
    from pypdfium2 import PdfiumError

    try:
        yield
    except PdfiumError as error:
        fault = _FAULTS.get(getattr(error, "err_code", None), str(error).rstrip("."))
        raise ValueError(f"{what} cannot be read: {fault}{advice}") from error
