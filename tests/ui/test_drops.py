"""Files dropped and texts pasted, by the browser's own events: what becomes of each kind, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm4lite_ui.chats import Attachment
from tests.ui.acts import ask, wait_for_end
from tests.ui.conftest import Serve, Site
from tests.ui.files import archive, paragraph, pdf, word

Visit = Callable[..., Any]
CHINESE = "北京的秋天\n第二行"
NOTEBOOK = {"cells": [{"cell_type": "code", "source": ["print(1)"], "outputs": []}], "metadata": {}}
KINDS = {
    "report.pdf": (pdf("First page", "Second page"), "report.pdf · PDF, 2 pages", "First page\n\nSecond page"),
    "letter.docx": (word(paragraph("Dear all")), "letter.docx · Word", "Dear all"),
    "说明.txt": (CHINESE.encode("gbk"), "说明.txt · GB18030", CHINESE),
    "wide.txt": (CHINESE.encode("utf-16"), "wide.txt · UTF-16", CHINESE),
    "study.ipynb": (json.dumps(NOTEBOOK).encode(), "study.ipynb · notebook", "```python\nprint(1)\n```"),
    "table.csv": ("name,age\nÅsa,40\n".encode(), "table.csv", "name,age\nÅsa,40\n"),
    "main.zig": (b'const std = @import("std");\n', "main.zig", 'const std = @import("std");\n'),
    "Makefile": (b"all:\n\ttrue\n", "Makefile", "all:\n\ttrue\n"),
}
REFUSED = {
    "photo.jpg": (b"\xff\xd8\xff\xe0\0", "photo.jpg cannot be read: it is a picture; the model reads text only"),
    "song.mp3": (b"ID3\4\0", "song.mp3 cannot be read: it is sound or film; the model reads text only"),
    "all.zip": (archive(a="b"), "all.zip cannot be read: it is an archive; unpack it"),
    "empty.txt": (b"", "empty.txt cannot be read: it is empty"),
}


def drop(page: Any, folder: Path, files: dict[str, bytes], at: str = "#thread") -> None:
    """Drags the files from a folder over a part of the page and lets go, as Chromium tells it of a mouse."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    box = page.locator(at).bounding_box()
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    paths = [str(folder / name) for name in files]
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        carried = {"items": [], "files": paths, "dragOperationsMask": 1}
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": carried})
        if kind == "dragOver":
            page.wait_for_selector("#drop-here:not([hidden])")
    page.wait_for_selector("#drop-here", state="hidden")


def sent(site: Site) -> list[Attachment]:
    """The files of the only message."""
    (turn,) = site.runtime.store.find()[0].turns
    return turn.files


def test_each_kind_of_file_that_holds_text_is_a_chip_with_its_name_and_reaches_the_model(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    site = serve()
    page = visit(site.url)
    drop(page, tmp_path, {name: content for name, (content, _, _) in KINDS.items()})
    assert page.locator("#chips li").count() == len(KINDS)  # at once, each with its name
    page.wait_for_function("!document.querySelector('#chips').textContent.includes('being read')")
    chips = page.locator("#chips li").all_inner_texts()
    tokens = [site.runtime.count(text) for _, _, text in KINDS.values()]
    assert chips == [f"{chip} · {count} tokens" for (_, chip, _), count in zip(KINDS.values(), tokens, strict=True)]
    ask(page, "What do they say?")
    wait_for_end(page)
    assert [(file.name, file.text) for file in sent(site)] == [(name, text) for name, (_, _, text) in KINDS.items()]
    assert page.locator(".question .chip").all_inner_texts() == chips
    assert not page.is_visible("#chips")


def test_what_holds_no_text_is_refused_with_the_reason_and_keeps_nothing_from_being_sent(
    serve: Serve, visit: Visit, tmp_path: Path
) -> None:
    site = serve()
    page = visit(site.url)
    drop(page, tmp_path, {name: content for name, (content, _) in REFUSED.items()} | {"good.txt": b"good"})
    page.wait_for_selector("#chips >> text=good.txt · ")
    assert page.locator("#chips .problem").all_inner_texts() == [said for _, said in REFUSED.values()]
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal
    page.get_by_label("Remove song.mp3").click()
    assert page.locator("#chips .problem").count() == len(REFUSED) - 1
    ask(page, "Hi")
    wait_for_end(page)
    assert [file.name for file in sent(site)] == ["good.txt"]


def test_files_may_be_dropped_anywhere_and_the_page_stays(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    page = visit(serve().url)
    address = page.url
    places = ("#thread", "#library", "#header", "#composer")
    for number, place in enumerate(places):
        drop(page, tmp_path, {f"one-{number}.txt": b"one", f"two-{number}.txt": b"two"}, place)
        page.wait_for_selector(f"#chips >> text=one-{number}.txt · ")
        page.wait_for_selector(f"#chips >> text=two-{number}.txt · ")
        assert page.locator("#chips li").count() == 2 * (number + 1)
        assert page.url == address


def test_several_files_chosen_with_the_clip_are_all_read(serve: Serve, visit: Visit, tmp_path: Path) -> None:
    page = visit(serve().url)
    for name in ("one.txt", "two.txt", "three.txt"):
        (tmp_path / name).write_text(name)
    with page.expect_file_chooser() as chooser:
        page.click("#attach")
    chooser.value.set_files([tmp_path / name for name in ("one.txt", "two.txt", "three.txt")])
    for name in ("one.txt", "two.txt", "three.txt"):
        page.wait_for_selector(f"#chips >> text={name} · ")


def test_a_text_pasted_with_the_keyboard_becomes_a_file_from_2000_characters_on(serve: Serve, visit: Visit) -> None:
    site = serve()
    page = visit(site.url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = "中文 and more. " * 200
    page.evaluate("text => navigator.clipboard.writeText(text)", text[:1999])
    page.focus("#message")
    page.keyboard.press("Control+v")
    page.wait_for_function("document.querySelector('#message').value")
    assert page.input_value("#message") == text[:1999]
    assert not page.is_visible("#chips")
    page.fill("#message", "")
    page.evaluate("text => navigator.clipboard.writeText(text)", text[:2000])
    page.keyboard.press("Control+v")
    page.wait_for_selector("#chips >> text=pasted-1.txt · ")
    assert page.input_value("#message") == ""
    ask(page, "Shorten it")
    wait_for_end(page)
    assert sent(site)[0].text == text[:2000]


def test_a_picture_that_is_pasted_is_refused_as_one_that_is_dropped(serve: Serve, visit: Visit) -> None:
    page = visit(serve().url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAX+XDSwAAAABJRU5ErkJggg=="
    assert base64.b64decode(dot).startswith(b"\x89PNG")
    page.evaluate(
        """async dot => {
          const blob = await (await fetch('data:image/png;base64,' + dot)).blob();
          await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
        }""",
        dot,
    )
    page.focus("#message")
    page.keyboard.press("Control+v")
    page.wait_for_selector("#chips .problem >> text=it is a picture; the model reads text only")
    visit.errors.clear()  # type: ignore[attr-defined]  # Chromium logs each answer that is a refusal
