"""Documents: rendering as in the authors' code, page selection, and clear errors for invalid files."""

from __future__ import annotations

import importlib.resources
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2
import pypdfium2.raw
import pytest

from aria.media import document
from aria.media.container import ReadDeadline
from aria.media.document import page_ranges
from aria.media.open import open_media
from aria.media.read import Page, read_document
from aria.processor import MediaSettings
from tests.helpers.made_media import endless_page, pdf


def read(data: bytes | Path, pages: Any = None, **limits: Any) -> list[Page]:
    settings = MediaSettings(**limits)
    return read_document(open_media(data, "document", settings), pages, settings)


def bar(page: Page) -> int:
    """Length of the bar in points."""
    return int((page.rgb[10, :, 0] < 128).sum()) // 2


def test_pages_at_twice_their_size_in_order(tmp_path: Path) -> None:
    data = pdf((200, 100), (100, 200), (150, 150), text="Hello")
    (tmp_path / "a.pdf").write_bytes(data)
    for source in (data, tmp_path / "a.pdf"):
        pages = read(source)
        assert [page.rgb.shape for page in pages] == [(200, 400, 3), (400, 200, 3), (300, 300, 3)]
        assert [(page.number, bar(page)) for page in pages] == [(1, 10), (2, 20), (3, 30)]
        assert all(page.rgb.dtype == np.uint8 and page.rgb.flags.c_contiguous for page in pages)
        assert (pages[0].rgb[80:140, 40:200] < 100).any() and pages[0].rgb[-1, -1].tolist() == [255] * 3, (
            "text on white"
        )


def test_colours_keep_their_order() -> None:
    paper = pypdfium2.PdfDocument.new()
    page = paper.new_page(50, 50)
    square = pypdfium2.raw.FPDFPageObj_CreateNewRect(0, 0, 50, 50)
    pypdfium2.raw.FPDFPageObj_SetFillColor(square, 255, 0, 0, 255)
    pypdfium2.raw.FPDFPath_SetDrawMode(square, pypdfium2.raw.FPDF_FILLMODE_WINDING, False)
    pypdfium2.raw.FPDFPage_InsertObject(page, square)
    page.gen_content()
    buffer = io.BytesIO()
    paper.save(buffer)
    paper.close()
    assert read(buffer.getvalue())[0].rgb[50, 50].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("pages", "expected"), [
    (None, [1, 2, 3, 4, 5]), ("2", [2]), ("1-3,5", [1, 2, 3, 5]), (" 4 - 5 , 1", [4, 5, 1]), ([5, 2], [5, 2]),
    ((1,), [1]),
])  # fmt: skip
def test_selected_pages(pages: Any, expected: list[int]) -> None:
    read_pages = read(pdf(*[(60, 20)] * 5), pages)
    assert [page.number for page in read_pages] == expected
    assert [bar(page) for page in read_pages] == [number * 10 for number in expected]


@pytest.mark.parametrize(("pages", "message"), [
    ("", "expected numbers and"), ("a", "expected numbers and"), ("1,,2", "expected numbers and"),
    ("-1", "expected numbers and"),
    ("1-", "expected numbers and"), ("1.5", "expected numbers and"), ("0", "page 0 requested"),
    ("6", "page 6 requested, but the document has pages 1 to 5"), ("3-2", "pages 3-2 requested"),
    ([], "pages is empty"),
    ("1-999999999", "pages 1-999999999 requested"), ([-1], "page -1 requested"), ("9" * 5000, "expected numbers and"),
])  # fmt: skip
def test_pages_that_do_not_exist(pages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        page_ranges(pages, 5)


@pytest.mark.parametrize(("data", "message"), [
    (b"", "not a PDF, is damaged"), (b"hello", "not a PDF, is damaged"), (b"%PDF-1.7\n", "not a PDF, is damaged"),
    (pdf((50, 50))[:200], "not a PDF, is damaged|cannot be rendered|has no pages"), (pdf(), "has no pages"),
])  # fmt: skip
def test_files_that_are_not_documents(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(data)


# A page behind a password (RC4, 40 bits) that is not the empty one.
LOCKED = b"""%%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 50 50]>>endobj
4 0 obj<</Filter/Standard/V 1/R 2/P -44/O<%s>/U<%s>>>endobj
trailer<</Root 1 0 R/Size 5/Encrypt 4 0 R/ID[<00><00>]>>
%%%%EOF
""" % (b"00" * 32, b"11" * 32)


def test_an_encrypted_document() -> None:
    with pytest.raises(ValueError, match="encrypted with a password"):
        read(LOCKED)


def test_limits() -> None:
    data = pdf(*[(60, 20)] * 5)
    with pytest.raises(ValueError, match=r'5 pages of .* are requested, but 4 are allowed; choose some.*"1-8"'):
        read(data, max_pages=4)
    assert len(read(data, "1-4", max_pages=4)) == 4
    with pytest.raises(ValueError, match=r"5000000 pages of .* are requested"):
        read(data, "1-5," * 999_999 + "1-5")
    with pytest.raises(
        ValueError, match=r"page 2 of .* would be 28000 x 28000 pixels, more than the 36,000,000 allowed"
    ):
        read(pdf((60, 20), (14_000, 14_000)))
    with pytest.raises(ValueError, match="took longer than"):
        read(data, decode_timeout=1e-9)


def test_several_threads_at_once() -> None:
    data = pdf(*[(200, 200)] * 6, text="Aria")
    expected = [page.rgb for page in read(data)]
    found: list[list[Page]] = []
    threads = [threading.Thread(target=lambda: found.append(read(data))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for pages in found:
        assert all(np.array_equal(page.rgb, other) for page, other in zip(pages, expected, strict=True))


def test_an_endless_page_times_out() -> None:
    with pytest.raises(ValueError, match=r"took longer than 0\.5 s"):
        read(endless_page(), decode_timeout=0.5)


def test_an_endless_page_does_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, over = threading.Event(), threading.Event()

    class UntilOver(ReadDeadline):
        def check(self) -> None:
            if drawing.is_set() and over.is_set():
                raise ValueError("over")

    real = document._draw

    def draw(*arguments: Any) -> None:
        drawing.set()
        real(*arguments)

    monkeypatch.setattr(document, "ReadDeadline", UntilOver)
    monkeypatch.setattr(document, "_draw", draw)
    ended: list[str] = []

    def read_slowly() -> None:
        with pytest.raises(ValueError, match="over"):
            read(endless_page())
        ended.append("over")

    thread = threading.Thread(target=read_slowly)
    thread.start()
    assert drawing.wait(60)
    assert len(read(pdf((50, 50)))) == 1 and not ended, "the small one waited for the large one"
    over.set()
    thread.join()
    assert ended == ["over"]


def test_a_real_document() -> None:
    # Matplotlib ships its logo as a PDF with embedded outlines.
    logo = Path(str(importlib.resources.files("matplotlib") / "mpl-data" / "images" / "matplotlib.pdf"))
    [page] = read(logo)
    with pypdfium2.PdfDocument(logo) as paper:
        width, height = paper[0].get_size()
    assert abs(page.rgb.shape[0] - 2 * height) <= 1 and abs(page.rgb.shape[1] - 2 * width) <= 1
    assert (page.rgb.reshape(-1, 3) == 255).all(-1).mean() < 0.95, "something is drawn"


def bare(catalog: bytes, boxes: bytes = b"/MediaBox[0 0 60 60]") -> bytes:
    """A PDF with one empty page."""
    return b"""%%PDF-1.7
1 0 obj<</Type/Catalog/Pages 2 0 R%b>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R%b>>endobj
4 0 obj<</Length 5>>stream
<a/>
endstream endobj
trailer<</Root 1 0 R/Size 5>>
%%%%EOF
""" % (catalog, boxes)


def test_dynamic_forms_are_rejected_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.pdf").write_bytes(pdf())
    for source in (pdf(), tmp_path / "empty.pdf", pdf()):
        with pytest.raises(ValueError, match="password"):
            read(LOCKED)  # whose error PDFium remembers
        with pytest.raises(ValueError, match="cannot be read: it has no pages"):
            read(source)
    for catalog in (b"/AcroForm<</Fields[]/XFA 4 0 R>>", b"/NeedsRendering true/AcroForm<</Fields[]/XFA 4 0 R>>"):
        with pytest.raises(ValueError, match=r"is a dynamic XFA form.*print it to a PDF"):
            read(bare(catalog))


def test_a_form_whose_xfa_was_emptied_is_an_ordinary_document() -> None:
    for xfa in (b"null", b"[]", b"()", b"[(template) 9 0 R]"):
        for flag in (b"", b"/NeedsRendering true"):
            assert len(read(bare(flag + b"/AcroForm<</Fields[]/XFA " + xfa + b">>"))) == 1


def test_a_broken_page_is_named_and_the_others_can_be_chosen() -> None:
    data = bare(b"", b"/MediaBox[0 0 60 60]").replace(b"/Count 1", b"/Count 2").replace(b"3 0 R]", b"3 0 R null]")
    with pytest.raises(ValueError, match=r"page 2 of .* cannot be read: .*; exclude it with pages="):
        read(data)
    assert [page.number for page in read(data, "1")] == [1]
    for pages in (1, [1.0], ["1"]):
        with pytest.raises(ValueError, match="expected whole numbers in a list"):
            read(data, pages)


def test_pages_without_area_are_named() -> None:
    assert read(bare(b""))[0].rgb.shape == (120, 120, 3)
    with pytest.raises(ValueError, match=r"page 1 of .* has no area"):
        read(bare(b"", b"/MediaBox[0 0 60 60]/CropBox[80 80 90 90]"))
