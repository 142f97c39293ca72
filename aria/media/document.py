"""Documents to pages: PDF, rendered at twice its size as the authors do it (144 dots per inch)."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from aria.media.container import Watch
from aria.media.limits import MediaSettings
from aria.media.open import Opened
from aria.media.progress import ProgressCounter

SCALE = 2
"""Pixels for each point (1/72 inch) of a page."""
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?")
# PDFium holds state of the whole process.
_PDFIUM = threading.Lock()
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


class Page(NamedTuple):
    """A page of a document."""

    number: int
    """From 1."""
    rgb: np.ndarray
    """uint8 ``(Y, X, 3)``."""
    total: int
    """Pages of the whole document."""


def read_document(
    document: Opened, pages: str | Sequence[int] | None = None, settings: MediaSettings | None = None
) -> list[Page]:
    """Pages of a PDF, with their annotations and filled forms.

    Args:
        document: the file, as :func:`~aria.media.open.open_medium` lets it in.
        pages: numbers from 1, as a list or as text such as ``1-3,7``, in the order wanted; None: all.
        settings: limits on pages and pixels; None: those of :class:`MediaSettings`.

    Raises:
        ValueError: no PDF, a damaged or locked one, pages that it does not have, or over a limit.
    """
    settings = settings or MediaSettings()
    watch = Watch(document.name, settings.decode_timeout)
    with _opened(document) as pdf:
        with _PDFIUM:
            count = len(pdf)
        if not count:
            raise ValueError(f"{document.name} has no pages")
        ranges = [(1, count)] if pages is None else page_ranges(pages, count)
        asked = sum(last - first + 1 for first, last in ranges)
        if asked > settings.max_pages:
            raise ValueError(
                f"{asked} pages of {document.name} are asked for, but {settings.max_pages} are allowed; "
                'choose some, such as pages="1-8"'
            )
        read = []
        progress = ProgressCounter("document", asked)
        for number in (number for first, last in ranges for number in range(first, last + 1)):
            watch.check()
            read.append(Page(number, _render(pdf, number, document.name, settings.page_pixels, watch), count))
            progress.add()
        return read


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
def _opened(document: Opened) -> Iterator[Any]:
    import pypdfium2

    with _said_plainly(f"{document.name}, as a document,"), _PDFIUM:
        # A document without pages fails to load and leaves the code of whatever failed before, here or elsewhere.
        pypdfium2.raw.FPDF_LoadDocument(b"", None)
        assert pypdfium2.raw.FPDF_GetLastError() == _UNSET, "PDFium no longer reports a missing file by this code"
        pdf = pypdfium2.PdfDocument(document.data)
    with _closing(pdf):
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


def _render(pdf: Any, number: int, name: str, max_pixels: int, watch: Watch) -> np.ndarray:
    import pypdfium2

    with contextlib.ExitStack() as opened, _said_plainly(f"page {number} of {name}", "; leave it out with pages="):
        with _PDFIUM:
            page = opened.enter_context(_closing(pdf[number - 1]))
            width, height = (math.ceil(side * SCALE) for side in page.get_size())
            if not width or not height:
                raise ValueError(
                    f"page {number} of {name} has no area ({width} x {height} pixels); leave it out with pages="
                )
            if width * height > max_pixels:
                raise ValueError(
                    f"page {number} of {name} would be {width} x {height} pixels, more than the {max_pixels:,} "
                    "allowed; make it smaller, or leave it out with pages="
                )
            bitmap = pypdfium2.PdfBitmap.new_native(
                width, height, format=pypdfium2.raw.FPDFBitmap_BGR, rev_byteorder=True
            )
            opened.enter_context(_closing(bitmap))
            bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        _draw(pdf, page, bitmap, watch)
        # Its memory goes back to PDFium.
        return np.array(bitmap.to_numpy(), order="C")


def _draw(pdf: Any, page: Any, bitmap: Any, watch: Watch) -> None:
    """Draw a page onto a bitmap of its size, a slice of time after the other.

    A page of a few kilobytes can take hours. Other documents get their turn between slices, and the watch can end it.
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
            watch.check()
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
def _said_plainly(what: str, advice: str = "") -> Iterator[None]:
    """PDFium's errors, as ValueErrors that say what cannot be read."""
    from pypdfium2 import PdfiumError

    try:
        yield
    except PdfiumError as error:
        fault = _FAULTS.get(getattr(error, "err_code", None), str(error).rstrip("."))
        raise ValueError(f"{what} cannot be read: {fault}{advice}") from error
