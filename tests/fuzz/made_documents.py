"""Small PDFs: written by PDFium, and by hand with what such files may have besides pages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence


def documents() -> Iterator[bytes]:
    """PDFs of one or two small pages."""
    import pypdfium2

    pdf = pypdfium2.PdfDocument.new()
    pdf.new_page(20, 30)
    pdf.new_page(8, 8)
    file = io.BytesIO()
    pdf.save(file)
    pdf.close()
    yield file.getvalue()
    drawn = b"1 0 0 rg 2 2 9 9 re f BT /F 5 Tf 1 1 Td (Hi) Tj ET /X Do /S sh"
    yield by_hand(drawn)
    yield by_hand(b"q 1 0 0 1 2 2 cm /X Do Q BI /W 2 /H 2 /BPC 8 /CS /G /F /AHx ID 00FF80AA> EI")
    form = b"/AcroForm <</Fields [6 0 R] /DA (/F 5 Tf)>>"
    field = b"<</Type /Annot /Subtype /Widget /FT /Tx /T (t) /V (v) /Rect [1 1 9 9] /DA (/F 5 Tf)>>"
    yield by_hand(drawn, catalog=form, more=[field], page=b"/Annots [6 0 R]")


def by_hand(content: bytes, catalog: bytes = b"", page: bytes = b"", more: Sequence[bytes] = ()) -> bytes:
    """A PDF of one page with a font, a form within it and a shading."""
    xobject = b"<</Type /XObject /Subtype /Form /BBox [0 0 9 9] /Length 15>>\nstream\n0 0 5 5 re f*  \nendstream"
    shading = (
        b"<</ShadingType 2 /ColorSpace /DeviceGray /Coords [0 0 9 9] /Function <</FunctionType 2 /N 1 /Domain [0 1]>>>>"
    )
    font = b"<</Type /Font /Subtype /Type1 /BaseFont /Helvetica>>"
    resources = b"<</Font <</F %s>> /XObject <</X 5 0 R>> /Shading <</S %s>>>>" % (font, shading)
    objects = [
        b"<</Type /Catalog /Pages 2 0 R %s>>" % catalog,
        b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
        b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 20 20] /Contents 4 0 R /Resources %s %s>>" % (resources, page),
        b"<</Length %d>>\nstream\n%s\nendstream" % (len(content), content),
        xobject,
        *more,
    ]
    out, places = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    return bytes(out + b"trailer <</Size %d /Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start))
