"""Small real files of kinds that a user attaches or imports, written by hand."""

from __future__ import annotations

import io
import zipfile

_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_OTHER = "http://schemas.openxmlformats.org/markup-compatibility/2006"


def pdf(*pages: str, extra: bytes = b"") -> bytes:
    """A PDF with these pages in Helvetica; `extra` goes into the dictionary of the first content stream."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids: list[bytes] = []
    for text in pages:
        lines = b" T* ".join(b"(%s) Tj" % line.encode("latin-1") for line in text.split("\n"))
        objects.append(stream(b"BT /F1 12 Tf 14 TL 72 720 Td %s ET" % lines, extra if not kids else b""))
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> /XObject << /X0 4 0 R >> >> >>" % len(objects)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(pages), b" ".join(kids))
    return pdf_of(objects)


def stream(data: bytes, extra: bytes = b"") -> bytes:
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(data), extra, data)


def pdf_of(objects: list[bytes]) -> bytes:
    """Object 1 is the catalog."""
    written, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(written))
        written += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return (
        written
        + b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
        + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(written))
    )


def archive(**members: bytes | str) -> bytes:
    """A zip archive; "__" in a name stands for "/"."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name.replace("__", "/"), content)
    return file.getvalue()


def word(body: str, before: str = "") -> bytes:
    """A .docx with this body."""
    document = f'<?xml version="1.0"?>{before}<w:document xmlns:w="{_WORD}" xmlns:mc="{_OTHER}"><w:body>{body}'
    return archive(**{"[Content_Types].xml": "<Types/>", "word/document.xml": f"{document}</w:body></w:document>"})


def paragraph(text: str, properties: str = "") -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"
