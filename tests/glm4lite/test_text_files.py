"""Text files in the encodings people have, and what is no text."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from glm4lite.text.encodings import decoded
from glm4lite.text.text_files import MAX_BYTES, TextFileError, read_text_file

CHINESE = "这是一个测试文件，包含一些中文内容。\n第二行：价格 12 元"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (CHINESE, "utf-8"),
        (CHINESE, "utf-8-sig"),
        (CHINESE, "gbk"),
        ("你好，请看下面这些数据。", "gb18030"),
        (CHINESE, "utf-16"),
        (CHINESE, "utf-32"),
        ("plain words", "utf-16-le"),
        ("plain words", "utf-16-be"),
        ("繁體中文測試，這是一個檔案", "big5"),
        ("こんにちは世界。これは日本語のテストです", "shift_jis"),
        ("Grüße aus München, schöne Straße", "cp1252"),
        ("café été déjà vu, naïve façade à la carte", "latin-1"),
        ("Привет, как дела? Это тестовый файл.", "cp1251"),
        ("", "utf-8"),
    ],
)
def test_text_is_read_in_any_common_encoding(text: str, encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(text.encode(encoding))
    assert read_text_file(file).text == text


@pytest.mark.parametrize(
    "data",
    [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"MZ\x90\0\3\0\0\0", bytes(range(256)), b"\x7fELF\2\1\1\0", b"\1\0\2\0"],
)
def test_what_is_binary_is_no_text(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"text|encoding"):
        decoded(data)


def test_random_bytes_are_no_text() -> None:
    draw = random.Random(1)
    for _ in range(50):
        with pytest.raises(ValueError, match=r"text|encoding"):
            decoded(draw.randbytes(300))


def test_lines_end_alike_and_the_fence_is_longer_than_any_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"one\r\n````\r\ntwo")
    file = read_text_file(tmp_path / "a.md")
    assert file.text == "one\n````\ntwo"
    assert file.quoted() == f"File a.md:\n`````\n{file.text}\n`````"


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * (MAX_BYTES + 1))
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\1")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    for name, said in [
        ("gone\n\x1b[2J", "No such file"),
        ("large", "is larger than 2 MiB"),
        ("binary", "it is no text"),
        ("", "cannot be read"),
        ("a\0b", "cannot be read"),
        ("x" * 300, "cannot be read"),
        *([("pipe", "it is not a regular file")] if hasattr(os, "mkfifo") else []),
    ]:
        with pytest.raises(TextFileError, match=said) as caught:
            read_text_file(tmp_path / name)
        assert str(caught.value).isprintable()
