"""Chats from files: our own exports, ChatGPT's, Open WebUI's; whatever is in them, the server goes on."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.errors import Glm4liteError
from glm4lite.base.sentences import Sentence
from glm4lite.untrusted.apart import Limits
from glm4lite_ui.chats import Attachment, Chat, ChatError, Part, Settings, Turn, read_chat
from glm4lite_ui.export import as_json, write_archive
from glm4lite_ui.saved import importing
from glm4lite_ui.saved.importing import Imported, import_chats
from glm4lite_ui.saved.store import ChatStore
from glm4lite_ui.untrusted import archives
from glm4lite_ui.untrusted.messages import Skipped
from tests.ui.files import archive


def imported(folder: Path, data: Any, name: str = "conversations.json") -> tuple[ChatStore, Imported]:
    file = folder / "upload"
    file.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    store = ChatStore(folder / "chats")
    return store, import_chats(store, file, name)


def said(chat: Chat) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(turn.user, [(part.kind, part.text) for part in turn.parts]) for turn in chat.turns]


def chatgpt(*nodes: tuple[str, str | None, str, Any], current: str | None = None, **fields: Any) -> dict[str, Any]:
    """A conversation of ChatGPT's export. A node: id, parent, role, and its text or its whole content."""
    mapping: dict[str, Any] = {}
    for name, parent, role, content in nodes:
        content = {"content_type": "text", "parts": [content]} if isinstance(content, str) else content
        message = {"id": name, "author": {"role": role}, "content": content, "recipient": "all", "metadata": {}}
        mapping[name] = {"id": name, "parent": parent, "children": [], "message": message if role else None}
        if parent in mapping:
            mapping[parent]["children"].append(name)
    described = {"title": "A talk", "create_time": 1700000000.5, "update_time": 1700000100.5, "conversation_id": "c1"}
    return described | {"mapping": mapping, "current_node": current or nodes[-1][0]} | fields


TALK = chatgpt(
    ("root", None, "", None), ("s", "root", "system", ""), ("u1", "s", "user", "Hi"),
    ("a1", "u1", "assistant", "Hello"), ("a1b", "u1", "assistant", "Hey"), ("u2", "a1", "user", "And?"),
    ("a2", "u2", "assistant", "So\ue200cite\ue202turn0\ue201."), ("u2b", "a1", "user", "Or?"),
    ("t", "u2b", "assistant", {"content_type": "thoughts", "thoughts": [{"content": "Hm"}, {"content": "Yes"}]}),
    ("tool", "t", "tool", "a result"), ("a2b", "tool", "assistant", "Either."), ("a2c", "a2b", "assistant", "Or both."),
    current="a2",
)  # fmt: skip


def test_chatgpts_tree_keeps_its_versions_and_shows_the_way_that_was_shown(tmp_path: Path) -> None:
    store, came = imported(tmp_path, [TALK])
    (chat,) = store.find()
    assert came.chats == [chat.id]
    assert (chat.title, chat.created, chat.updated) == ("A talk", 1700000000.5, 1700000100.5)
    assert said(chat) == [("Hi", [("text", "Hello")]), ("And?", [("text", "So.")])]
    first, second = chat.turns
    assert [turn.parts[0].text for turn in chat.versions(first)] == ["Hello", "Hey"]
    assert [turn.user for turn in chat.versions(second)] == ["And?", "Or?"]
    other = chat.versions(second)[1]
    assert [(part.kind, part.text) for part in other.parts] == [
        ("thinking", "Hm\n\nYes"),
        ("text", "Either.\n\nOr both."),
    ]
    assert came.left_out["calls of tools"] == 1
    assert " ".join(came.said()) == "Imported 1 chat. Left out: calls of tools (1)."


def test_the_archive_that_chatgpt_sends_is_read_and_its_other_files_are_not_missed(tmp_path: Path) -> None:
    sent = archive(**{"x/conversations.json": json.dumps([TALK]), "user.json": "{}", "chat.html": "<p>", "a.png": "x"})
    store, came = imported(tmp_path, sent, "export.zip")
    assert [chat.title for chat in store.summaries()] == ["A talk"]
    assert came.skipped == []


def test_pictures_and_instructions_are_left_out_and_counted(tmp_path: Path) -> None:
    picture = {"content_type": "multimodal_text", "parts": [{"asset_pointer": "file://x"}, "What is this?"]}
    talk = chatgpt(
        ("i", None, "user", {"content_type": "user_editable_context", "user_profile": "me"}),
        ("u", "i", "user", picture), ("a", "u", "assistant", "A cat"),
    )  # fmt: skip
    store, came = imported(tmp_path, [talk])
    assert said(store.find()[0]) == [("What is this?", [("text", "A cat")])]
    assert came.left_out["pictures and files"] == 1


def open_webui(*messages: tuple[str, str | None, str, Any], **fields: Any) -> dict[str, Any]:
    history: dict[str, Any] = {}
    for name, parent, role, content in messages:
        history[name] = {"id": name, "parentId": parent, "childrenIds": [], "role": role, "content": content}
        if parent in history:
            history[parent]["childrenIds"].append(name)
    chat = {
        "title": "Inner",
        "history": {"messages": history, "currentId": messages[-1][0]},
        "timestamp": 1700000000123,
    }
    return {
        "id": "w1",
        "title": "Webby",
        "chat": chat | fields,
        "created_at": 1700000000,
        "updated_at": 1700000050,
        "pinned": True,
    }


FOLDED = (
    '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds</summary>\n'
    "&gt; is 1 &lt; 2?\n&gt; yes\n</details>\nIt is."
)


def test_open_webuis_chats_come_with_thoughts_versions_and_system_prompt(tmp_path: Path) -> None:
    talk = open_webui(
        ("u", None, "user", "Is 1 < 2?"), ("a", "u", "assistant", "No."), ("b", "u", "assistant", FOLDED),
        params={"system": "Be brief."},
    )  # fmt: skip
    store, came = imported(tmp_path, [talk], "chat-export.json")
    (chat,) = store.find()
    assert came.skipped == []
    assert (chat.title, chat.updated, chat.pinned, chat.settings.system) == ("Webby", 1700000050, True, "Be brief.")
    assert said(chat) == [("Is 1 < 2?", [("thinking", "is 1 < 2?\nyes"), ("text", "It is.")])]
    assert len(chat.versions(chat.turns[0])) == 2


def test_a_list_of_openais_messages_is_a_chat(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url"}]},
        {"role": "assistant", "content": "Hello"}, {"role": "tool", "content": "x"},
    ]  # fmt: skip
    store, came = imported(tmp_path, {"messages": messages})
    (chat,) = store.find()
    assert (chat.title, chat.settings.system, said(chat)) == ("Hi", "Be brief.", [("Hi", [("text", "Hello")])])
    assert came.left_out["pictures and files"] == 1


def own_chat() -> Chat:
    chat = Chat.of(
        Turn("Hi", [Attachment("a.pdf", "text", 1, "PDF", Sentence(""), 2)], [Part("thinking", 0, "Hm", seconds=1)]),
        Turn("Und?", parts=[Part("call", 0, "888", "calculator", "{}", seconds=1), Part("text", 1, "Ü", seconds=1)]),
        title="Eigener / Titel", settings=Settings("Be brief.", temperature=0.5, always=["python"]), folder="Work",
    )  # fmt: skip
    chat.another(chat.turns[1], "Or?")
    return chat


def test_our_own_archive_of_all_chats_comes_back_whole(tmp_path: Path) -> None:
    chats, file = [own_chat(), own_chat()], io.BytesIO()
    write_archive(chats, file)
    with zipfile.ZipFile(file) as packed:
        assert sorted(packed.namelist()) == sorted(
            f"{kind}/Eigener-Titel-{chat.id}.{kind}" for chat in chats for kind in ("json", "md")
        )
    store, came = imported(tmp_path, file.getvalue(), "glm4lite-chats.zip")
    assert sorted(came.chats) == sorted(chat.id for chat in chats)
    for chat in chats:
        chat.settings.always.clear()  # what was allowed elsewhere was not allowed here
        assert store.load(chat.id) == chat


def test_one_exported_chat_comes_back_and_a_second_time_it_is_left_as_it_is(tmp_path: Path) -> None:
    chat = own_chat()
    store, came = imported(tmp_path, as_json(chat).encode())
    assert came.chats == [chat.id]
    changed = store.load(chat.id)
    changed.title = "changed"
    store.save(changed)
    store, came = imported(tmp_path, as_json(chat).encode())
    assert (came.chats, came.skipped) == ([], [("Eigener / Titel", "it is here already")])
    assert " ".join(came.said()) == 'Imported 0 chats. Skipped 1: "Eigener / Titel": it is here already.'
    assert store.load(chat.id).title == "changed"
    for _ in range(2):
        store, came = imported(tmp_path, [TALK])
    assert came.skipped == [("A talk", "it is here already")]


def test_what_cannot_be_taken_is_skipped_with_the_reason_and_the_rest_comes(tmp_path: Path) -> None:
    circle = chatgpt(("a", "b", "user", "x"), ("b", "a", "assistant", "y"), conversation_id="c2", title="round")
    partly = chatgpt(
        ("u", None, "user", "Hi"), ("v", "u", "assistant", "Hello"), ("a", "b", "user", "x"), ("b", "a", "user", "y"),
        conversation_id="c3", title="partly",
    )  # fmt: skip
    itself = chatgpt(("a", "a", "user", "x"), conversation_id="c4", title="itself")
    newer = json.loads(as_json(own_chat())) | {"format": 9}
    odd: list[Any] = [5, None, [], {"title": "empty"}]
    odd.append({"mapping": {"a": 5, "b": {"message": {"author": 5, "content": []}}}})
    store, came = imported(tmp_path, [circle, partly, itself, newer, *odd, TALK])
    assert sorted(chat.title for chat in store.summaries()) == ["A talk", "partly"]
    reasons = dict(came.skipped)
    assert reasons["round"] == reasons["itself"] == "nothing was asked in it"
    assert "a newer glm4lite saved it" in reasons["Eigener / Titel"]
    assert reasons["empty"] == "it is in no form that is known here"
    assert len(came.skipped) == 8
    assert came.left_out["messages that follow each other in a circle"] == 5


ODD: tuple[Any, ...] = (None, 5, 1e400, "", "u1", [], {}, [[]], {"a": 1}, True, [1, "u1"], float("nan"), "\ud800")


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if way:
        yield way
    if isinstance(value, dict | list):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[name], (*way, name))


def test_whatever_stands_where_in_an_export_a_chat_is_taken_or_skipped() -> None:
    drawn = random.Random(1)
    webui = open_webui(("u", None, "user", "q"), ("a", "u", "assistant", FOLDED), params={"system": "x"})
    seeds = [TALK, webui, json.loads(as_json(own_chat())), {"messages": [{"role": "user", "content": "x"}]}]
    outcomes = Counter[str]()
    for _ in range(1000):
        export = copy.deepcopy(drawn.choice(seeds))
        for _ in range(drawn.choice((1, 2, 4))):
            *way, last = drawn.choice(list(places(export)))
            at = export
            for name in way:
                at = at[name]
            at[last] = copy.deepcopy(drawn.choice(ODD))
        try:
            read_chat(json.loads(json.dumps(archives._chat(export, Counter()).to_json())))
            outcomes["taken"] += 1
        except Skipped:
            outcomes["skipped"] += 1
    assert min(outcomes["taken"], outcomes["skipped"]) > 100


def test_odd_times_and_titles_do_no_harm(tmp_path: Path) -> None:
    talk = TALK | {"title": "a\nb \ud800" + "x" * 500, "create_time": -1, "update_time": 1e300}
    store, _ = imported(tmp_path, [talk])
    (chat,) = store.summaries()
    assert chat.title.startswith("a b ?x")
    assert len(chat.title) == 120
    assert abs(chat.updated - store.load(chat.id).created) < 1


REFUSED = [
    (b"{", "no JSON at character 0"), (b"", "holds no chats"), (b"[]", "holds no chats"),
    (b"\xff\xfe", "no JSON in UTF-8"), (b"[" * 200_000, "nested too deeply"),
    (b'[{"a": ' * 200_000, "nested too deeply"), (b"PK\3\4 broken", "is damaged"),
    (archive(**{"a.txt": "x"}), "holds no chats"), (archive(**{"a.json": "{"}), "a.json: it is no JSON"),
    (archive(**{f"{place}.json": "{}" for place in range(20_001)}), "holds 20,001 files"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_a_file_that_holds_no_chats_is_refused_in_one_line(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(Glm4liteError) as caught:
        imported(tmp_path, data, "x.json")
    assert str(caught.value).startswith("x.json cannot be imported: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_archive_that_grows_without_bound_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
        packed.open("a.json", "w", force_zip64=True) as big,
    ):
        for _ in range(257):
            big.write(b" " * (1 << 20))
    with pytest.raises(Glm4liteError, match=r"a\.json: it takes more than 256 MiB"):
        imported(tmp_path, file.getvalue())


def test_a_chat_of_millions_of_empty_lists_is_skipped_or_refused_not_taken(tmp_path: Path) -> None:
    huge = b'[{"title": "huge", "mapping": {"a": [' + b"[]," * (20 << 20) + b"[]]}}]"
    with suppress(Glm4liteError):  # where memory is short
        _, came = imported(tmp_path, huge)
        assert came.chats == []
    assert list((tmp_path / "chats").glob("*.json")) == []


def test_chats_that_came_before_the_file_failed_stay_and_that_is_said(tmp_path: Path) -> None:
    whole = json.dumps([TALK])
    for number, (text, why) in enumerate(
        {whole[:-1] + ", {": "is no JSON at character", whole[:-1]: "ends in the"}.items()
    ):
        store, came = imported(tmp_path, text.replace('"c1"', f'"d{number}"').encode())
        assert [chat.title for chat in store.summaries()] == ["A talk"] * (number + 1)
        assert " ".join(came.said()).startswith("Imported 1 chat. ")
        assert f"Then: it {why}" in " ".join(came.said())


def test_a_full_disk_is_said_with_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = ChatStore.save, list[str]()

    def until_full(store: ChatStore, chat: Chat, said: bool = True) -> None:
        if saved:
            raise ChatError("the chat could not be saved: No space left on device")
        saved.append(chat.id)
        save(store, chat, said)

    monkeypatch.setattr(ChatStore, "save", until_full)
    _, came = imported(tmp_path, [TALK, TALK | {"conversation_id": "other"}])
    assert came.chats == saved
    assert came.failure is not None
    assert "No space left" in came.failure


def test_reading_an_export_is_ended_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "_LIMITS", Limits(seconds=0.05))
    with pytest.raises(Glm4liteError, match=r"longer than 0\.05 s"):
        imported(tmp_path, [TALK])


def test_long_chats_and_many_chats_come_in_a_few_seconds(tmp_path: Path) -> None:
    nodes: list[tuple[str, str | None, str, Any]] = []
    for number in range(4000):
        nodes.append(
            (f"n{number}", f"n{number - 1}" if number else None, ("user", "assistant")[number % 2], "words " * 20)
        )
    many = [chatgpt(*nodes, conversation_id="long")]
    many += [chatgpt(*nodes[:30], conversation_id=str(number)) for number in range(200)]
    (tmp_path / "upload").write_text(json.dumps(many))
    store = ChatStore(tmp_path / "chats")
    came = import_chats(store, tmp_path / "upload", "conversations.json")
    assert len(came.chats) == 201
    assert max(chat.turns for chat in store.summaries()) == 2000
