"""PDFs: pages of the sizes reserved before rendering, in a few bytes per pixel."""

from __future__ import annotations

from collections.abc import Iterator

from aria.media import document
from aria.media.limits import MediaSettings
from aria.workers import LocalJob
from tests.fuzz.made_documents import documents

SETTINGS = MediaSettings(page_pixels=1 << 16, max_pages=3, decode_timeout=5.0)
MEMORY = 512 << 20
WORDS = (
    *(
        "/Type",
        "/Page",
        "/Kids",
        "/Count",
        "/MediaBox",
        "/Contents",
        "/Resources",
        "/Length",
        "/Filter",
        "/FlateDecode",
    ),
    *("/ASCIIHexDecode", "/LZWDecode", "/JBIG2Decode", "/XObject", "/Form", "/Subtype", "/Annots", "/AcroForm", "/XFA"),
    *(
        "stream",
        "endstream",
        "endobj",
        "xref",
        "trailer",
        "startxref",
        "obj",
        " 0 R",
        "Do",
        "BI",
        "ID",
        "EI",
        "sh",
        "cm",
    ),
)


def fuzz(data: bytes) -> None:
    asked: list[tuple[int, int]] = []

    def take(pixels: int, nbytes: int) -> None:
        asked.append((pixels, nbytes))

    calls = {"sizes": lambda width, height: [], "take": take, "progress": lambda *values: None}
    job = LocalJob([data], calls)
    try:
        result = document.read(job, "the document", None, SETTINGS)
    except ValueError as error:
        assert "the document" in str(error), f"an error that does not say of what: {error}"
        return
    assert len(asked) == 1, "memory was asked for more than once"
    assert len(result["read"]) == len(job.arrays) == result["pages"] <= SETTINGS.max_pages
    pixels = 0
    for (_, width, height, _), array in zip(result["read"], job.arrays, strict=True):
        assert array.shape == (height, width, 3)
        assert width * height <= SETTINGS.page_pixels
        pixels += width * height
    assert pixels == asked[0][0], f"{asked[0][0]} pixels were asked for, {pixels} came"


def seeds() -> Iterator[bytes]:
    yield from documents()
