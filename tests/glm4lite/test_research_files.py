"""What research finds in the user's files: the index of their text, and folders as they are found on disks."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from glm4lite.research import folder as folders
from glm4lite.research.documents import read_document
from glm4lite.research.folder import Folder
from glm4lite.research.index import PASSAGE, Entry, Index, Stamp, passages, terms
from glm4lite.research.source import Hit, SourceError
from tests.ui.files import pdf

STAMP = Stamp(1, 1)


@pytest.fixture(autouse=True)
def indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLM4LITE_INDEXES", str(tmp_path / "indexes"))
    return tmp_path / "indexes"


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "one.sqlite")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "tides.md").write_text("# Tides\n\nThe moon pulls the sea.\n", encoding="utf-8")
    (folder / "sub" / "budget.txt").write_text("The quarterly budget is 300 euros.", encoding="utf-8")
    (folder / "中文.md").write_text("# 潮汐\n\n月球的引力造成潮汐现象。", encoding="utf-8")
    return folder


def refreshed(path: Path, **options: Any) -> Folder:
    folder = Folder(path, **options)
    folder.refresh()
    return folder


def put(index: Index, path: str, stamp: Stamp, title: str, text: str) -> None:
    index.change(entries=[Entry(path, stamp, title, text)])


def urls(hits: list[Hit]) -> list[str]:
    return [hit.url for hit in hits]


# --- the index


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("The committee was studying tides.", "study"), ("Émigré cafés", "emigre cafe"), ("月球的引力", "引力"),
        ("月球的引力", "月球引力"), ("全文检索引擎", "检索"), ("一个好", "好"), ("ひらがなとカタカナ", "カタカナ"),
        ("한국어 문서", "문서"), ("ＦＵＬＬ width", "full"), ("C++ and x86_64", "x86_64"), ("版本2.5发布", "2.5"),
    ],
)  # fmt: skip
def test_words_are_found_in_every_script(index: Index, text: str, query: str) -> None:
    put(index, "a.md", STAMP, "A", text)
    put(index, "b.md", STAMP, "B", "nothing of it, 无关")
    assert [one.path for one in index.search(query, 5)] == ["a.md"]


@pytest.mark.parametrize(
    "query", ["", " ", '"', "a AND", "NEAR(", "col:x *", "-x ^y", "\0", "'; DROP TABLE files; --", "😀", "x" * 10**6]
)
def test_no_query_is_an_error(index: Index, query: str) -> None:
    put(index, "b.md", STAMP, "B", "text")
    assert index.search(query, 5) == []
    assert index.count() == 1


def test_more_and_rarer_words_and_those_of_titles_come_first(index: Index) -> None:
    put(index, "both.md", STAMP, "x", "moon and tides")
    put(index, "one.md", STAMP, "x", "moon and stars")
    for number in range(5):
        put(index, f"{number}.md", STAMP, "x", "moon and sun")
    assert index.search("moon tides", 9)[0].path == "both.md"
    put(index, "title.md", STAMP, "Tides", "what the sea does")
    assert [one.path for one in index.search("tides", 9)] == ["title.md", "both.md"]


@pytest.mark.parametrize(
    "text", ["", "a", "word " * 2000, "月" * 5000, "line\n" * 900, "一句话。" * 700, "a\n\n" * 999]
)
def test_passages_leave_nothing_out(index: Index, text: str) -> None:
    cut = list(passages(text))
    assert "".join(passage for _, passage in cut) == text
    assert all(text[at : at + len(passage)] == passage and 0 < len(passage) <= PASSAGE for at, passage in cut)
    put(index, "a.md", STAMP, "A", text)
    assert index.text("a.md") == ("A", text, "")


def test_a_file_that_is_put_again_replaces_what_was_there(index: Index) -> None:
    put(index, "a.md", STAMP, "A", "old words")
    put(index, "a.md", Stamp(2, 2), "A", "new words")
    assert (index.search("old", 5), index.stamps()) == ([], {"a.md": Stamp(2, 2)})
    index.change(gone=["a.md"])
    assert (index.search("new", 5), index.stamps(), index.text("a.md")) == ([], {}, None)


def test_an_index_that_is_full_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    index = Index(tmp_path / "small.sqlite", largest=1 << 20)
    put(index, "a.md", STAMP, "A", "first")
    with pytest.raises(SourceError, match="is full \\(it takes at most 1 MiB\\)"):
        put(index, "b.md", STAMP, "B", " ".join(map(str, range(200_000))))
    assert list(index.stamps()) == ["a.md"]
    assert (tmp_path / "small.sqlite").stat().st_size <= 1 << 20


@pytest.mark.parametrize("content", [b"no database at all, but long enough to look like a header" * 100, b"SQLite"])
def test_an_index_that_is_damaged_is_made_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.sqlite").write_bytes(content)
    with pytest.raises(SourceError, match=r"was damaged .* it is made again"):
        Index(tmp_path / "bad.sqlite")
    index = Index(tmp_path / "bad.sqlite")
    put(index, "a.md", STAMP, "A", "text")
    assert index.count() == 1


def test_pages_of_an_index_that_were_overwritten_are_noticed_and_it_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "torn.sqlite"
    index = Index(path)
    for number in range(50):
        put(index, f"{number}.md", STAMP, "A", "some words " * 200)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:4096] + os.urandom(size - 4096))
    with pytest.raises(SourceError, match="was damaged"):
        index.search("words", 5)
    assert Index(path).stamps() == {}


def test_an_index_of_another_version_is_made_again(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "new.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
        database.execute("CREATE TABLE files(other)")
    database.close()
    assert Index(tmp_path / "new.sqlite").stamps() == {}


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_an_index_is_for_its_user_alone(docs: Path, indexes: Path) -> None:
    refreshed(docs)
    assert indexes.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in indexes.iterdir()} == {0}


def test_two_may_write_an_index_at_once(tmp_path: Path) -> None:
    indexes = [Index(tmp_path / "both.sqlite") for _ in range(2)]

    def fill(number: int) -> None:
        for file in range(20):
            put(indexes[number], f"{number}-{file}.md", STAMP, "A", "shared words")

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert indexes[0].count() == 40


@pytest.mark.parametrize(
    ("query", "file"),
    [
        ("今年的研发预算是多少", "预算"), ("植物怎样产生氧气", "光合作用"), ("我想请病假要什么材料", "请假"),
        ("中国最长的河流是哪条", "长江"), ("怎样减少显存占用？", "量化"), ("地震了应该躲在哪里", "地震"),
    ],
)  # fmt: skip
def test_a_chinese_question_finds_its_file_first(index: Index, query: str, file: str) -> None:
    texts = {
        "预算": "本年度研发预算为三百万元，其中硬件一百二十万元。预算由财务部审批。",
        "光合作用": "光合作用是植物利用光能把二氧化碳和水转化为有机物并释放氧气的过程。",
        "请假": "员工每年有十天年假。请假需要提前三天申请，病假需要医院证明。",
        "长江": "长江全长约六千三百公里，是亚洲最长的河流，发源于青藏高原。",
        "黄河": "黄河是中国第二长河，因含沙量大而呈黄色，被称为母亲河。",
        "量化": "模型量化把权重变为四位整数，显存占用降到四分之一左右。",
        "地震": "地震发生时应躲在坚固的桌子下面，保护头部，远离窗户。",
        "北京": "北京是中国的首都，有故宫、天坛和长城等名胜古迹。",
    }
    index.change(entries=[Entry(f"{name}.md", STAMP, name, text) for name, text in texts.items()])
    assert index.search(query, 3)[0].title == file


@pytest.mark.slow
def test_an_indexing_that_is_killed_leaves_whole_files_and_is_gone_on_with(tmp_path: Path) -> None:
    docs = tmp_path / "many"
    docs.mkdir()
    for number in range(400):
        (docs / f"{number}.md").write_text(f"# Note {number}\n\n" + "月球的引力 and the sea. " * 300, encoding="utf-8")
    code = "import pathlib, sys, glm4lite.research.folder as f; f.Folder(pathlib.Path(sys.argv[1])).refresh()"
    killed = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(docs)])
        before, folder = Folder(docs).index.count(), Folder(docs)
        while process.poll() is None and folder.index.count() <= before + 20:
            time.sleep(0.01)
        process.kill()
        killed += process.wait() != 0
        assert all(folder.index.text(path)[1].endswith("the sea. ") for path in folder.index.stamps())  # type: ignore[index]
        with closing(sqlite3.connect(folder.index.path)) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            database.execute("INSERT INTO terms(terms) VALUES ('integrity-check')")
    assert killed
    assert refreshed(docs).index.count() == 400


def test_the_words_of_chinese_are_its_pairs() -> None:
    assert terms("SQLite 全文检索") == "SQLite 全文 文检 检索 索"


# --- folders


def test_files_are_found_by_what_they_say_and_opened(docs: Path) -> None:
    folder = refreshed(docs)
    (hit,) = folder.search("budget", 5)
    assert (hit.url, hit.snippet) == ("doc:docs/sub/budget.txt", "The quarterly budget is 300 euros.")
    assert hit.link == (docs / "sub" / "budget.txt").as_uri()
    page = folder.open(hit.url)
    assert page is not None
    assert page.text == "The quarterly budget is 300 euros."
    (chinese,) = folder.search("引力是什么", 5)
    assert chinese.title == "潮汐"
    opened = folder.open(chinese.url)
    assert opened is not None
    assert "月球的引力" in opened.text
    assert folder.open("https://example.org/") is None
    with pytest.raises(SourceError, match="no such file in the folder docs"):
        folder.open("doc:docs/../secret.txt")


def test_only_what_changed_is_read_again(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refreshed(docs)
    read = list[str]()
    entry = Folder._entry

    def watched(self: Folder, path: str) -> Entry | None:
        read.append(path)
        return entry(self, path)

    monkeypatch.setattr(Folder, "_entry", watched)
    (docs / "tides.md").write_text("# Tides\n\nThe sun pulls, too.", encoding="utf-8")
    (docs / "new.txt").write_text("A fresh note.", encoding="utf-8")
    (docs / "sub" / "budget.txt").unlink()
    folder = refreshed(docs)  # another process, say
    assert sorted(read) == ["new.txt", "tides.md"]
    assert folder.search("moon", 5) == []
    assert folder.search("budget", 5) == []
    assert urls(folder.search("fresh", 5)) == ["doc:docs/new.txt"]


def test_html_pdf_and_other_encodings_are_text_too(docs: Path) -> None:
    (docs / "page.html").write_bytes(
        b"<title>Reefs &amp; fish</title><style>p{}</style><nav>Home</nav><p>Coral <b>reefs</b> grow.<p>Slowly."
        b"<script>alert(1)</script>"
    )
    (docs / "paper.pdf").write_bytes(pdf("Abyssal plains"))
    (docs / "gbk.txt").write_bytes("这是一个用国标编码保存的文件，里面写着珊瑚礁的知识。".encode("gbk"))
    folder = refreshed(docs)
    assert folder.notes == []
    (hit,) = folder.search("coral", 5)
    page = folder.open(hit.url)
    assert page is not None
    assert (hit.title, page.text) == ("Reefs & fish", "Coral reefs grow.\nSlowly.")
    assert urls(folder.search("abyssal", 5)) == ["doc:docs/paper.pdf"]
    assert urls(folder.search("珊瑚礁", 5)) == ["doc:docs/gbk.txt"]


def test_what_cannot_be_read_is_a_sentence_and_the_rest_is_found(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "LARGEST_FILE", 1000)
    (docs / "broken.pdf").write_bytes(pdf("lost")[:60] + b"\xff" * 50)
    (docs / "empty.txt").write_bytes(b"")
    (docs / "picture.txt").write_bytes(bytes(range(256)) * 3)
    (docs / "large.txt").write_bytes(b"x" * 1001)
    folder = refreshed(docs)
    said = dict(note.split(": ", 1) for note in folder.notes)
    assert said.pop("broken.pdf").startswith("it cannot be read: it is damaged")
    assert said == {
        "empty.txt": "it cannot be read: it holds no text",
        "picture.txt": "it cannot be read: it is no text",
        "large.txt": "it is larger than 0 MiB",
    }
    assert len(folder.search("moon budget", 5)) == 2
    with pytest.raises(SourceError, match=r"broken\.pdf: it cannot be read"):
        folder.open("doc:docs/broken.pdf")
    again = refreshed(docs)
    assert again.notes == []  # said once, until the file changes


def test_a_file_whose_reader_is_not_installed_is_read_once_that_is_there(
    docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "paper.pdf").write_bytes(pdf("Abyssal plains"))
    with monkeypatch.context() as without:
        without.setattr("glm4lite.base.extras._installed", lambda package: package != "pypdf")
        folder = refreshed(docs)
    assert folder.notes == ["paper.pdf: reading PDF needs pypdf: pip install 'glm4lite[documents]'"]
    folder.refresh()
    assert urls(folder.search("abyssal", 5)) == ["doc:docs/paper.pdf"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_lead_nowhere(docs: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("The password is swordfish.")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "more.txt").write_text("Another swordfish.")
    (docs / "link.txt").symlink_to(tmp_path / "secret.txt")
    (docs / "out").symlink_to(tmp_path / "outside")
    (docs / "loop").symlink_to(docs)
    (docs / "gone.txt").symlink_to(tmp_path / "nothing")
    folder = refreshed(docs)
    assert folder.search("swordfish password", 5) == []
    assert folder.notes == ["links are not followed; docs holds 4"]
    assert len(folder.search("moon", 5)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_becomes_a_link_between_listing_and_reading_is_not_followed(
    docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "budget.txt").write_text("The password is swordfish.")
    read = Folder._read

    def swapped(self: Folder, path: str) -> Any:
        if path == "sub/budget.txt":
            (docs / path).unlink()
            if what == "file":
                (docs / path).symlink_to(tmp_path / "outside" / "budget.txt")
            else:
                (docs / "sub").rmdir()
                (docs / "sub").symlink_to(tmp_path / "outside")
        return read(self, path)

    monkeypatch.setattr(Folder, "_read", swapped)
    folder = refreshed(docs)
    assert folder.search("swordfish", 5) == []
    assert any(note.startswith("sub/budget.txt cannot be read: ") for note in folder.notes)


def test_a_folder_that_changes_while_it_is_read_is_searched_all_the_same(
    docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Folder._read

    def changing(self: Folder, path: str) -> Any:
        if path == "sub/budget.txt":
            (docs / path).unlink()
        if path == "tides.md":
            fstat = os.fstat
            grown = iter([fstat, lambda number: os.stat_result((*fstat(number)[:6], 9999, *fstat(number)[7:]))])
            with monkeypatch.context() as meanwhile:
                meanwhile.setattr(os, "fstat", lambda number: next(grown)(number))
                return read(self, path)
        return read(self, path)

    monkeypatch.setattr(Folder, "_read", changing)
    folder = refreshed(docs)
    assert folder.notes == [
        "tides.md cannot be read: it was changed meanwhile; it is read next time",
        "sub/budget.txt cannot be read: No such file or directory",
    ]
    assert len(folder.search("引力", 5)) == 1
    monkeypatch.setattr(Folder, "_read", read)
    folder.refresh()
    assert urls(folder.search("moon", 5)) == ["doc:docs/tides.md"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_pipes_hidden_files_and_other_kinds_are_left_out(docs: Path) -> None:
    os.mkfifo(docs / "pipe.txt")
    (docs / ".hidden.md").write_text("swordfish")
    (docs / ".git").mkdir()
    (docs / ".git" / "note.md").write_text("swordfish")
    (docs / "program.exe").write_text("swordfish")
    folder = refreshed(docs)
    assert folder.search("swordfish", 5) == []
    assert folder.index.count() == 3


def test_what_was_read_before_a_stop_is_kept(docs: Path) -> None:
    folder, stop, seen = Folder(docs), threading.Event(), list[tuple[int, int]]()

    def told(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 1:
            stop.set()

    folder.refresh(told, stop)
    assert seen == [(0, 3), (1, 3)]
    assert folder.notes == ["2 files of docs were not read yet"]
    assert folder.index.count() == 1
    folder.refresh(told)
    assert seen[2:] == [(0, 2), (1, 2), (2, 2)]


def test_the_number_of_files_and_of_indexes_is_bounded(
    docs: Path, tmp_path: Path, indexes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MOST_FILES", 2)
    folder = refreshed(docs)
    assert folder.index.count() == 2
    assert folder.notes == ["of docs only the first 2 files are searched"]
    monkeypatch.setattr(folders, "_MOST_INDEXES", 2)
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        Folder(tmp_path / str(number))
    assert len(list(indexes.glob("*.sqlite"))) == 2


@pytest.mark.parametrize("name", ["nothing", "file.txt", "a\0b"])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(SourceError, match=r"--docs .*: it cannot be read as a folder"):
        Folder(tmp_path / name)


def test_where_no_index_can_be_kept_is_said(docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("x")
    monkeypatch.setenv("GLM4LITE_INDEXES", str(tmp_path / "taken"))
    with pytest.raises(SourceError, match=r"the index .* cannot be written"):
        Folder(docs)


def test_a_document_without_a_heading_has_no_title() -> None:
    assert read_document(b"\xef\xbb\xbfplain\r\ntext", "text").text == "plain\ntext"
    assert read_document("# 标题 #\n正文".encode(), "text").title == "标题"
    assert read_document(b"x" * 3_000_000, "text").note == "only the beginning of it was read"
