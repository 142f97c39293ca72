"""Documents to pages: PDF, rendered at twice its size as the authors do it (144 dots per inch)."""

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
"""Pixels for each point (1/72 inch) of a page."""
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")
# PDFium holds state of the whole process.
_PDFIUM = threading.Lock()
_DRAWING_BYTES = 16
"""Of memory for each pixel of a page while it is drawn and brought to its sizes."""
_SLICE = 0.2
"""Seconds of drawing until others get their turn."""
_UNSET = 2
"""PDFium's code for a missing file, which is ruled out before: set on purpose, to see whether it is overwritten."""
_FAULTS: dict[int | None, str] = {
    _UNSET: "it has no pages",
    3: "it is no PDF, a damaged one, or one without pages",
    4: "it is locked with a password",
    5: "its encryption is not known",
}


def read(job: Any, name: str, pages: str | Sequence[int] | None, settings: MediaSettings) -> dict[str, Any]:
    """Read pages of the PDF in a job's file, with their annotations and filled forms.

    Before anything is drawn it calls ``sizes(width, height)`` for each page, and ``take(pixels, bytes)``.
    The result has the document's number of pages, and ``(number, width, height, number of arrays)`` of each page that
    was asked for, whose arrays are ``(height, width, 3)``.

    Args:
        job: see :class:`aria.workers.child.Job`.
        name: what errors call the file.
        pages: numbers from 1, as a list or as text such as ``1-3,7``, in the order wanted; None: all.
        settings: limits on pages, pixels and time.

    Raises:
        ValueError: no PDF, a damaged or locked one, pages that it does not have, or over a limit.
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
                f"{asked} pages of {name} are asked for, but {settings.max_pages} are allowed; "
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
    """Ask for the pixels of all pages, and for the memory of what stays and of the largest page as it is drawn."""
    pixels = sum(width * height for _, (width, height), _ in plans)
    kept = sum(width * height for _, size, sizes in plans for width, height in sizes or [size])
    drawn = max(width * height for _, (width, height), _ in plans)
    job.call("take", pixels, 3 * kept + _DRAWING_BYTES * drawn)


def page_ranges(pages: str | Sequence[int], count: int) -> list[tuple[int, int]]:
    """First and last of each range that ``1-3,7`` or a list of numbers asks for, of a document of ``count`` pages.

    Raises:
        ValueError: it cannot be understood, or asks for pages that are not there.
    """
    if isinstance(pages, str):
        ranges = []
        for part in pages.split(","):
            match = _RANGE.fullmatch(part)
            if match is None:
                raise ValueError(f'pages {pages!r:.60} are not understood; expected numbers and ranges such as "1-3,7"')
            ranges.append((int(match[1]), int(match[2] or match[1])))
    elif isinstance(pages, Iterable) and all(isinstance(number, int) for number in pages):
        ranges = [(number, number) for number in pages]
    else:
        raise ValueError(f'pages is {pages!r:.60}; expected whole numbers in a list, or text such as "1-3,7"')
    for first, last in ranges:
        if not 1 <= first <= last <= count:
            asked = f"page {first}" if first == last else f"pages {first}-{last}"
            raise ValueError(f"{asked} asked for, but the document has pages 1 to {count}")
    if not ranges:
        raise ValueError("pages is empty; leave it out for all of them")
    return ranges


@contextlib.contextmanager
def _opened(document: MediaFile) -> Iterator[Any]:
    import pypdfium2

    with contextlib.ExitStack() as opened:
        with _readable_errors(f"{document.name}, as a document,"), _PDFIUM:
            # A document without pages fails to load and leaves the code of whatever failed before, here or elsewhere.
            pypdfium2.raw.FPDF_LoadDocument(b"", None)
            assert pypdfium2.raw.FPDF_GetLastError() == _UNSET, "PDFium no longer reports a missing file by this code"
            pdf = pypdfium2.PdfDocument(opened.enter_context(document.file()))
        opened.enter_context(_closing(pdf))
        with _PDFIUM:
            if _is_dynamic_form(pdf):
                raise ValueError(
                    f"{document.name} is a dynamic XFA form: only Adobe's programs make its real pages, and the "
                    "file holds one page that says so; print it to a PDF there, and send that"
                )
            pdf.init_forms()
        yield pdf


def _is_dynamic_form(pdf: Any) -> bool:
    """Whether the only page asks to open the file elsewhere. Static XFA forms have their fields on their pages, too."""
    from pypdfium2 import raw

    if raw.FPDF_GetXFAPacketCount(pdf) < 1:  # emptied, as programs do that keep what they do not know
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
    """(width, height) in pixels of a page as it will be drawn; nothing of its content is read."""
    from pypdfium2 import raw

    size = raw.FS_SIZEF()
    with _PDFIUM:
        known = raw.FPDF_GetPageSizeByIndexF(pdf, number - 1, size)
    if not known:
        raise ValueError(f"page {number} of {name} cannot be read: it is missing or damaged; leave it out with pages=")
    width, height = (math.ceil(side * SCALE) for side in (size.width, size.height))
    if not width or not height:
        raise ValueError(f"page {number} of {name} has no area ({width} x {height} pixels); leave it out with pages=")
    if width * height > max_pixels:
        raise ValueError(
            f"page {number} of {name} would be {width} x {height} pixels, more than the {max_pixels:,} "
            "allowed; make it smaller, or leave it out with pages="
        )
    return width, height


def _render(pdf: Any, number: int, size: tuple[int, int], name: str, deadline: ReadDeadline) -> np.ndarray:
    import pypdfium2

    width, height = size
    with contextlib.ExitStack() as opened, _readable_errors(f"page {number} of {name}", "; leave it out with pages="):
        with _PDFIUM:
            page = opened.enter_context(_closing(pdf[number - 1]))
            bitmap = pypdfium2.PdfBitmap.new_native(
                width, height, format=pypdfium2.raw.FPDFBitmap_BGR, rev_byteorder=True
            )
            opened.enter_context(_closing(bitmap))
            bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        _draw(pdf, page, bitmap, deadline)
        # Its memory goes back to PDFium.
        return np.array(bitmap.to_numpy(), order="C")


def _draw(pdf: Any, page: Any, bitmap: Any, deadline: ReadDeadline) -> None:
    """Draw a page onto a bitmap of its size, a slice of time after the other.

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
            time.sleep(0.001)  # who waits for the lock would else hardly ever get it
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
    """PDFium's errors, as ValueErrors that say what cannot be read."""
    from pypdfium2 import PdfiumError

    try:
        yield
    except PdfiumError as error:
        fault = _FAULTS.get(getattr(error, "err_code", None), str(error).rstrip("."))
        raise ValueError(f"{what} cannot be read: {fault}{advice}") from error
