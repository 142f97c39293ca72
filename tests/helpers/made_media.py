"""Generated clips and PDFs; each frame and page shows its number."""

from __future__ import annotations

import io
import zlib
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pypdfium2
import pypdfium2.raw

WIDTH, HEIGHT, CELL = 128, 96, 32


def drawing(number: int) -> np.ndarray:
    """Draw a frame that shows its number in black and white cells, with grey below."""
    picture = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    for bit in range(8):
        row, column = divmod(bit, 4)
        picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = 255 * (number >> bit & 1)
    return picture


def number_in(rgb: np.ndarray) -> int:
    height, width = rgb.shape[:2]
    cells = [(bit // 4 * 2 + 1, bit % 4 * 2 + 1) for bit in range(8)]
    return sum(
        int(rgb[row * height // 6, column * width // 8].mean() > 127) << i for i, (row, column) in enumerate(cells)
    )


def clip(
    count: int = 100,
    *,
    kind: str = "mp4",
    codec: str = "libx264",
    rate: int = 25,
    times: list[int] | None = None,
    unit: Fraction | None = None,
    draw: Any = drawing,
    prepare: Any = lambda stream: None,
    **options: str,
) -> bytes:
    """Make a clip of ``count`` frames; ``times`` in ``unit`` give a variable frame rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = draw(0).shape[:2]
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        unit = unit or Fraction(1, rate)
        stream.codec_context.time_base = unit
        prepare(stream)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(draw(number), "rgb24")
            frame.pts, frame.time_base = times[number] if times else number, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def authors(total: int, count: int) -> list[int]:
    return [int(total / count * (i + 0.5)) for i in range(count)]


def pdf(*sizes: tuple[float, float], text: str = "") -> bytes:
    """Make a PDF with a page per size in points; page N has a black bar of N x 10 points at the top, and the text."""
    document = pypdfium2.PdfDocument.new()
    for number, (width, height) in enumerate(sizes, 1):
        page = document.new_page(width, height)
        bar = pypdfium2.raw.FPDFPageObj_CreateNewRect(0, height - 10, number * 10, 10)
        pypdfium2.raw.FPDFPath_SetDrawMode(bar, pypdfium2.raw.FPDF_FILLMODE_WINDING, False)
        pypdfium2.raw.FPDFPage_InsertObject(page, bar)
        if text:
            words = pypdfium2.raw.FPDFPageObj_NewTextObj(document, b"Helvetica", 24)
            coded = (text + "\0").encode("utf-16-le")
            pypdfium2.raw.FPDFText_SetText(
                words, (pypdfium2.raw.FPDF_WCHAR * (len(coded) // 2)).from_buffer_copy(coded)
            )
            pypdfium2.raw.FPDFPageObj_Transform(words, 1, 0, 0, 1, 20, height - 60)
            pypdfium2.raw.FPDFPage_InsertObject(page, words)
        page.gen_content()
    buffer = io.BytesIO()
    document.save(buffer)
    document.close()
    return buffer.getvalue()


def endless_page() -> bytes:
    """A few kilobytes whose drawing takes minutes: the same large shape again and again."""
    drawing = zlib.compress(b"0 0 m 600 600 l 300 0 l 0 300 l b\n" * 100_000)
    return b"""%%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 600]/Contents 4 0 R/Resources<<>>>>endobj
4 0 obj<</Length %d/Filter/FlateDecode>>stream
%b
endstream endobj
trailer<</Root 1 0 R/Size 5>>
%%%%EOF
""" % (len(drawing), drawing)
