"""Words by themselves, in the encodings of their languages: read right, or said to be a guess."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glm4lite.text.encodings import decoded

_SECTION = re.compile(r"^(.+):\n((?:.+\n)+)", re.MULTILINE)
WORDS = {
    language: words.split()
    for language, words in _SECTION.findall(Path(__file__).with_name("words.txt").read_text(encoding="utf-8"))
}


def readings(language: str, encoding: str) -> list[tuple[str, str, bool]]:
    """Of the words that are no UTF-8 then: the word, what it was read as, whether that is called a guess."""
    found = []
    for word in WORDS[language]:
        data = word.encode(encoding)
        try:
            data.decode()
        except UnicodeDecodeError:
            text, told = decoded(data)
            found.append((word, text, told.pattern == "{encoding}, a guess"))
    return found


def test_chinese_words_of_two_and_three_letters_are_read_right_in_gbk() -> None:
    found = readings("Chinese", "gbk")
    wrong = [(word, text) for word, text, _ in found if text != word]
    assert len(found) > 230
    assert len(wrong) <= len(found) // 100, wrong
    assert all(guess for word, text, guess in found if text != word), wrong


@pytest.mark.parametrize(
    ("language", "encoding"),
    [("Western", "cp1252"), ("Russian", "cp1251"), ("Japanese", "cp932")],
)
def test_words_of_other_languages_are_read_right(language: str, encoding: str) -> None:
    found = readings(language, encoding)
    assert len(found) > 30
    assert [(word, text) for word, text, _ in found if text != word] == []


@pytest.mark.parametrize(
    ("language", "encoding", "share"),
    [
        ("Russian", "koi8_r", 0.95),
        ("Korean", "cp949", 0.9),
        ("traditional Chinese", "big5", 0.85),
        ("Japanese", "euc_jp", 0.5),
    ],
)
def test_words_whose_bytes_are_common_chinese_too_are_right_or_called_a_guess(
    language: str, encoding: str, share: float
) -> None:
    found = readings(language, encoding)
    wrong = [(word, text) for word, text, guess in found if text != word and not guess]
    assert sum(word == text for word, text, _ in found) >= share * len(found)
    assert len(wrong) <= 0.03 * len(found), wrong


def test_some_lines_leave_no_guess_and_latin_letters_around_change_nothing() -> None:
    for text, encoding, name in [
        ("# 初始化\nprint('hello')  # 打印\n", "gbk", "GB18030"),
        ("name,city\n张三,北京\n李四,上海\n", "gbk", "GB18030"),
        ("Привет, как дела? Это файл.", "koi8_r", "KOI8-R"),
        ("こんにちは世界。これはテストです", "euc_jp", "EUC-JP"),
        ("안녕하세요. 이것은 테스트입니다", "cp949", "EUC-KR"),
        ("Le café est déjà fermé à midi", "cp1252", "Windows-1252"),
    ]:
        assert decoded(text.encode(encoding)) == (text, name)


def test_a_letter_cut_at_the_end_and_a_long_file_are_read_all_the_same() -> None:
    text = "第二行：价格十二元\n" * 2000
    assert decoded(text.encode("gbk")) == (text, "GB18030")
    read, told = decoded(("这是一个测试文件，包含一些中文内容。" * 3).encode("gbk") + b"\xd6")
    assert read.endswith("\ufffd")
    assert told == "GB18030, 1 unreadable"


def test_an_alphabet_that_is_not_known_is_refused() -> None:
    for text, encoding in [("สวัสดีชาวโลก ทดสอบ", "cp874"), ("Zażółć gęślą jaźń, żółty", "iso8859_2")]:
        with pytest.raises(ValueError, match="encoding is not known"):
            decoded(text.encode(encoding))


def test_or_called_a_guess_where_it_looks_like_another() -> None:
    _, told = decoded("مرحبا بالعالم".encode("cp1256"))
    assert told.pattern == "{encoding}, a guess"
