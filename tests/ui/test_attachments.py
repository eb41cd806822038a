"""Attached files: what is read of them, what is refused and how, and that no file harms the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm4lite.base.sentences import Sentence
from glm4lite.engine.engine import Engine
from glm4lite.engine.worker import EngineWorker
from glm4lite.untrusted.apart import Limits, UnreadableError, read_apart
from glm4lite_ui.attachments import Read, read, shown_name
from glm4lite_ui.chats import Attachment
from glm4lite_ui.history import question
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from tests.ui.files import archive, paragraph, pdf, pdf_of, stream, word

CHINESE = "今天天气很好，我们去公园散步。孩子们在草地上玩耍。\n"
TRADITIONAL = "今天天氣很好，我們去公園散步。孩子們在草地上玩耍。\n"
JAPANESE = "今日は天気がよくて、公園を散歩しました。\n"
KOREAN = "오늘은 날씨가 좋아서 공원에서 산책했습니다.\n"
RUSSIAN = "Сегодня хорошая погода, мы гуляем в парке.\n"
GERMAN = "Das Wetter ist schön. Die Straße führt über die Brücke.\n"
TEXTS = [
    ("utf-8", CHINESE, ""), ("utf-8-sig", CHINESE, ""), ("utf-16", CHINESE, "UTF-16"), ("utf-16-le", CHINESE, "UTF-16"),
    ("utf-16-be", "name,age\n张三,5\n", "UTF-16"), ("utf-32", CHINESE, "UTF-32"),
    ("gbk", CHINESE, "GB18030"), ("gbk", "你好，世界。", "GB18030"), ("gbk", "名称,数量\n苹果,12\n香蕉,7\n", "GB18030"),
    ("gb18030", CHINESE + "𠀀", "GB18030"), ("gbk", CHINESE * 4000, "GB18030"),
    ("big5", TRADITIONAL, "Big5"), ("big5", "你好，世界。", "Big5"), ("big5", "名稱,數量\n蘋果,12\n", "Big5"),
    ("shift_jis", JAPANESE, "Shift-JIS"), ("shift_jis", "商品名,数量\nりんご,12\n", "Shift-JIS"),
    ("euc_jp", JAPANESE, "EUC-JP"), ("cp949", KOREAN, "EUC-KR"), ("cp949", "안녕하세요 세계", "EUC-KR"),
    ("latin_1", GERMAN, "Windows-1252"), ("cp1252", "“Quotes” – and €5 café", "Windows-1252"),
    ("latin_1", "Ähnlich ist Öl in Österreich.", "Windows-1252"), ("cp1251", RUSSIAN, "Windows-1251"),
    ("koi8_r", RUSSIAN, "KOI8-R"),
]  # fmt: skip


@pytest.mark.parametrize(("encoding", "text", "told"), TEXTS)
def test_text_is_read_in_the_encoding_it_has_and_that_is_told(encoding: str, text: str, told: str) -> None:
    found = read(text.encode(encoding), "notes.txt")
    assert (found.text, found.encoding) == (text, told)


def test_a_few_damaged_bytes_are_told_and_many_are_refused() -> None:
    cut = (CHINESE * 4).encode()[:-2]
    found = read(cut, "cut.log")
    assert found.text.startswith(CHINESE)
    assert found.encoding == "UTF-8, 1 unreadable"


@pytest.mark.parametrize("name", ["a.rs", "Makefile", "x.unknown", "data.tsv", "a.svg", ".env", "noending"])
def test_text_is_text_whatever_its_name_ends_with(name: str) -> None:
    assert read(b"one\ttwo\n", name) == Read(name, "one\ttwo\n")


REFUSED = [
    (b"\x89PNG\r\n\x1a\n", "is a picture; the model reads text only"),
    (b"\xff\xd8\xff\xe0", "is a picture; the model reads text only"),
    (b"GIF89a", "is a picture; the model reads text only"),
    (b"RIFF\1\2\3\4WEBPVP8 ", "is a picture; the model reads text only"),
    (b"\0\0\0\x18ftypheic", "is a picture; the model reads text only"),
    (b"\0\0\0\x18ftypmp42", "is sound or film; the model reads text only"),
    (b"ID3\3\0", "is sound or film; the model reads text only"),
    (b"\x1f\x8b\x08\0", "is an archive; unpack it"),
    (b"x" * 257 + b"ustar", "is an archive; unpack it"),
    (archive(**{"a.txt": "x"}), "is an archive; unpack it"),
    (archive(**{"xl/workbook.xml": "x"}), "is a spreadsheet; save it as CSV"),
    (archive(**{"ppt/presentation.xml": "x"}), "is a presentation; save it as PDF"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a file of an old Office"),
    (b"\x7fELF\2\1", "is a program"),
    (b"SQLite format 3\0", "is no text"),
    (bytes(range(256)) * 20, "is no text"),
    (bytes(range(1, 256)) * 20, "is no text"),
    (b"PK\3\4 but no archive", "is damaged"),
    (b"", "is empty"),
    (b" \n", "holds no text"),
]


@pytest.mark.parametrize(("data", "why"), REFUSED, ids=[f"{why}-{place}" for place, (_, why) in enumerate(REFUSED)])
def test_what_holds_no_text_is_refused_with_the_reason_under_any_name(data: bytes, why: str) -> None:
    for name in ("a file.txt", "x"):
        with pytest.raises(UnreadableError) as caught:
            read(data, name)
        assert str(caught.value).startswith(f"{name} cannot be read: it {why}")
        assert "\n" not in str(caught.value)


def test_a_pdf_is_read_page_by_page() -> None:
    found = read(pdf("Hello world\nSecond line", "Page two"), "a.pdf")
    assert found == Read("a.pdf", "Hello world\nSecond line\n\nPage two", "PDF", pages=2)
    assert read(pdf("Alone"), "renamed.txt").form == "PDF"


def test_a_chinese_pdf_is_read_by_its_own_table_of_letters() -> None:
    table = (
        b"/CIDInit /ProcSet findresource begin begincmap 1 begincodespacerange <0000> <FFFF> endcodespacerange "
        b"2 beginbfchar <0001> <4F60> <0002> <597D> endbfchar endcmap end"
    )
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        stream(b"BT /F1 12 Tf 72 720 Td <00010002> Tj ET"),
        b"<< /Type /Font /Subtype /Type0 /BaseFont /Song /Encoding /Identity-H /ToUnicode 6 0 R"
        b" /DescendantFonts [<< /Type /Font /Subtype /CIDFontType2 /BaseFont /Song >>] >>",
        stream(table),
    ]  # fmt: skip
    assert read(pdf_of(objects), "你好.pdf").text == "你好"


def bomb() -> bytes:
    """Content of 1 GB of spaces, packed twice."""
    packed = zlib.compress(zlib.compress(b" " * (1 << 30), 9), 9)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R >>", stream(packed, b"/Filter [/FlateDecode /FlateDecode]"),
    ]  # fmt: skip
    return pdf_of(objects)


HOSTILE = {
    "a page that is its own parent": pdf("x").replace(b"/Kids [5 0 R]", b"/Kids [2 0 R]"),
    "a table that comes before itself": pdf("x").replace(b"/Root 1 0 R", b"/Root 1 0 R /Prev 9"),
    "no catalog": pdf("x").replace(b"/Root 1 0 R", b"/Root 9 0 R"),
    "cut": pdf("x")[:200],
    "noise": b"%PDF-1.7\n" + os.urandom(100_000),
    "deep arrays": pdf("x").replace(b"/Count 1", b"/Count 1 /X " + b"[" * 100_000),
    "a stream whose length is itself": pdf("x").replace(b"/Length 34", b"/Length 4 0 R"),
    "only pictures": pdf(""),
    "a bomb": bomb(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pdf_is_read_or_refused_in_time(name: str) -> None:
    began = time.monotonic()
    try:
        found = read(HOSTILE[name], "a.pdf").text
    except UnreadableError as error:
        found = str(error)
        assert found.startswith("a.pdf ")
        assert "\n" not in found
    assert len(found) < 1000
    assert time.monotonic() - began < 30


def test_a_word_file_becomes_markdown() -> None:
    row = "<w:tr><w:tc>{}</w:tc><w:tc>{}</w:tc></w:tr>"
    body = (
        paragraph("Title", '<w:pStyle w:val="Heading2"/>')
        + paragraph("One &amp; 你好")
        + paragraph("an item", '<w:numPr><w:ilvl w:val="0"/></w:numPr>')
        + "<w:p><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t><w:delText>gone</w:delText></w:r></w:p>"
        + f"<w:tbl>{row.format(paragraph('x'), paragraph('y'))}{row.format(paragraph('1'), paragraph('2'))}</w:tbl>"
        + "<mc:AlternateContent><mc:Choice>" + paragraph("new") + "</mc:Choice><mc:Fallback>" + paragraph("old")
        + "</mc:Fallback></mc:AlternateContent>"
    )  # fmt: skip
    found = read(word(body), "a.docx")
    assert found.text == "## Title\nOne & 你好\n- an item\na\tb\nc\n| x | y |\n| 1 | 2 |\nnew"
    assert found.form == "Word"


LAUGHS = "<!DOCTYPE x [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {letter} '{f'&{before};' * 10}'>" for before, letter in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (word(paragraph("&i;"), LAUGHS + "]>"), "its XML declares a document type"),
        (
            word(paragraph("&x;"), '<!DOCTYPE x [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
            "its XML declares a document",
        ),
        (archive(**{"word/document.xml": b" " * (65 << 20)}), "its text takes more than 64 MiB"),
        (archive(**{"word/document.xml": "<a>" * 1000}), "is damaged"),
        (word(""), "holds no text"),
        (word(paragraph("x"))[:300], "is damaged"),
    ],
)
def test_a_hostile_word_file_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(UnreadableError, match=why):
        read(data, "a.docx")


def test_a_notebook_becomes_markdown_with_its_results() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Words"]},
        {"cell_type": "code", "source": "print('```')\n", "outputs": [
            {"output_type": "stream", "text": ["```\n"]},
            {"output_type": "display_data", "data": {"image/png": "iVBOR", "text/plain": ["<Figure>"]}},
            {"output_type": "error", "evalue": "division by zero"},
        ]},
        {"cell_type": "code", "source": "big", "outputs": [{"data": {"text/plain": "y" * 3000}}]},
        {"cell_type": "code", "source": ""}, "odd", {"cell_type": "raw", "source": "raw"},
    ]  # fmt: skip
    data = json.dumps({"cells": cells, "metadata": {"language_info": {"name": "python"}}}).encode()
    found = read(data, "a.ipynb")
    assert found.text.startswith(
        "# Title\nWords\n\n````python\nprint('```')\n````\n\nOutput:\n````\n```\n````\n\nOutput:\n```\n<Figure>\n```"
    )
    assert "division by zero" in found.text
    assert f"{'y' * 2000}\n[cut: 3,000 characters]" in found.text
    assert "iVBOR" not in found.text
    assert found.form == "notebook"


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"cells": 5}', b"[" * 100_000, b'{"cells": []}'])
def test_a_notebook_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableError, match=r"a\.ipynb "):
        read(data, "a.ipynb")


def test_a_file_that_is_too_large_is_not_even_opened(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as huge:
        huge.truncate(1 << 40)
    with pytest.raises(UnreadableError, match=r"a\.txt cannot be read: it is larger than 64 MiB"):
        read(tmp_path / "a.txt", "a.txt")
    with pytest.raises(UnreadableError, match=r"a\.txt cannot be read: it holds more than 4,000,000 characters"):
        read(b"x" * 4_000_001, "a.txt")
    with pytest.raises(UnreadableError, match="b cannot be read"):
        read(tmp_path / "b", "b")


def test_reading_is_ended_by_time_and_by_memory_and_leaves_no_process() -> None:
    with pytest.raises(UnreadableError, match=r"longer than 0\.05 s"):
        list(read_apart("pdf", pdf("x"), Limits(seconds=0.05)))
    if sys.platform == "linux":
        with pytest.raises(UnreadableError, match="more than 100 MiB of memory"):
            list(read_apart("office", word(paragraph("x" * (60 << 20))), Limits(memory=100 << 20)))
    with pytest.raises(UnreadableError, match="too long"):
        list(read_apart("text", CHINESE.encode("gbk") * 100, Limits(line=1000)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a process such walls")
@pytest.mark.parametrize("attempt", ["open('/etc/passwd')", "open('x', 'w')", "socket.socket()", "os.kill(1, 0)"])
def test_where_files_are_read_nothing_else_can_be_reached(attempt: str) -> None:
    code = (
        "import os, socket\nfrom glm4lite.untrusted.process import _wall_in\n_wall_in()\n"
        f"try:\n    {attempt}\nexcept PermissionError:\n    print('refused')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    if "landlock" in done.stderr or done.stdout == "":
        pytest.skip("this kernel has no Landlock")
    assert done.stdout == "refused\n"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"), ("C:\\x\\y.txt", "y.txt"), ("a\nb\u202etxt.exe", "abtxt.exe"), ("", "file"),
        ("你好 世界.md", "你好 世界.md"),
        ("x" * 200 + ".txt", "x" * 99 + "…" + "x" * 16 + ".txt"), ("<b>.txt", "<b>.txt"),
    ],
)  # fmt: skip
def test_a_name_is_kept_but_changes_nothing_around_it(name: str, shown: str) -> None:
    assert shown_name(name) == shown


@pytest.fixture
def runtime(nano: Engine, tmp_path: Path) -> Iterator[Runtime]:
    runtime = Runtime(EngineWorker(nano), ChatStore(tmp_path / "chats"))
    yield runtime
    runtime.close()


def test_how_a_file_was_read_is_saved_with_the_message_and_the_model_reads_its_text(runtime: Runtime) -> None:
    attached = [runtime.attachment("a.txt", CHINESE.encode("gbk")), runtime.attachment("c.pdf", pdf("Hello"))]
    assert attached[0] == Attachment("a.txt", CHINESE, runtime.count(CHINESE), "text", Sentence("GB18030"))
    assert attached[1] == Attachment("c.pdf", "Hello", runtime.count("Hello"), "PDF", pages=1)
    chat = runtime.open("0" * 16)
    turn = chat.ask("Read", attached)
    runtime.store.save(chat)
    assert runtime.store.load(chat.id) == chat
    assert question(turn).endswith("File c.pdf:\n```\nHello\n```")
