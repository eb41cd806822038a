"""Saved chats, what the model reads of them, how they are shown and exported."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.events import Done, Progress, TextDelta, ThinkingDelta, ToolCallFinished, ToolCallStarted
from glm4lite.base.sentences import Sentence
from glm4lite.text.messages import Message, ToolCall
from glm4lite.tools.tool import Tool
from glm4lite_ui.answering import Asking, TurnWriter
from glm4lite_ui.artifacts import artifacts, artifacts_of
from glm4lite_ui.chats import Attachment, Chat, ChatError, Counts, Part, Settings, Turn, read_chat
from glm4lite_ui.export import as_json, as_markdown, file_name
from glm4lite_ui.history import messages
from glm4lite_ui.markdown import blocks
from glm4lite_ui.saved.store import ChatStore
from glm4lite_ui.thread import TurnView, arguments_blocks, asking_json, difference, turn_json

CALL = Part("call", 0, "888", "calculator", '{"expression": "37 * 24"}', seconds=0.01)
CHAT = Chat.of(
    Turn("What is 37 * 24?", parts=[CALL, Part("text", 1, "888.", seconds=0.1)]),
    Turn("And this?", [Attachment("a.txt", "one\n```\ntwo", 5)], [Part("text", 0, "Fine.", seconds=0.1)]),
    settings=Settings(system="Be brief."),
)


def test_a_chat_is_the_same_after_saving(tmp_path: Path) -> None:
    store = ChatStore(tmp_path)
    store.save(CHAT)
    assert store.load(CHAT.id) == CHAT
    assert [path.name for path in tmp_path.iterdir()] == [f"{CHAT.id}.json"]
    assert stat.S_IMODE((tmp_path / f"{CHAT.id}.json").stat().st_mode) == 0o600


def test_a_damaged_file_is_left_out_and_named_when_opened(tmp_path: Path) -> None:
    store = ChatStore(tmp_path)
    store.save(CHAT)
    for place, content in enumerate(("{", "[]", '{"format": 4}', '{"format": 1, "turns": 5}', "\x00")):
        (tmp_path / f"{place:016x}.json").write_text(content)
        with pytest.raises(ChatError, match="cannot be read"):
            store.load(f"{place:016x}")
    assert [chat.id for chat in store.find()] == [CHAT.id]


def test_a_chat_of_a_newer_version_is_refused_in_one_line(tmp_path: Path) -> None:
    store = ChatStore(tmp_path)
    (tmp_path / f"{1:016x}.json").write_text(json.dumps(CHAT.to_json() | {"format": 4}))
    with pytest.raises(
        ChatError, match=r"a newer glm4lite saved it \(format 4, this one reads up to 3\); update"
    ) as said:
        store.load(f"{1:016x}")
    assert "\n" not in str(said.value)


# As the first version of the page wrote it.
OLD = {
    "format": 1, "id": f"{1:016x}", "title": "What is 37 * 24?", "created": 1.0, "updated": 2.0,
    "settings": {"system": "Be brief.", "temperature": None, "top_p": 0.5, "max_new_tokens": 1024, "seed": None,
                 "tools": None, "always": ["calculator"]},
    "turns": [
        {"user": "What is 37 * 24?", "files": [], "error": None, "dropped": True, "parts": [
            {"kind": "call", "round": 0, "text": "888", "name": "calculator", "arguments": "{}", "error": False,
             "seconds": 0.1}],
         "counts": {"prompt_tokens": 3, "new_tokens": 2, "finish_reason": "stop", "tokens_per_s": 1.5,
                    "prefilled_tokens": 3}},
        {"user": "And this?", "files": [{"name": "a.txt", "text": "one", "tokens": 1}], "parts": [], "counts": None,
         "error": "It failed.", "dropped": False},
    ],
}  # fmt: skip


def test_a_chat_of_the_first_version_is_read_the_same_each_time_and_saved_in_the_new_form(tmp_path: Path) -> None:
    store, path = ChatStore(tmp_path), tmp_path / f"{1:016x}.json"
    path.write_text(json.dumps(OLD))
    chat = store.load(path.stem)
    assert [turn.user for turn in chat.turns] == ["What is 37 * 24?", "And this?"]
    assert chat.turns[0].parts == [Part("call", 0, "888", "calculator", "{}", seconds=0.1)]
    assert chat.turns[0].counts == Counts(3, 2, "stop", 1.5, 3)
    assert chat.turns[1].files == [Attachment("a.txt", "one", 1)]
    assert (chat.turns[0].dropped, chat.turns[1].error) == (True, "It failed.")
    assert chat.settings == Settings(system="Be brief.", top_p=0.5, always=["calculator"])  # 1024 was everybody's
    assert store.load(path.stem) == chat
    store.save(chat)
    assert json.loads(path.read_text())["format"] == 3
    assert store.load(path.stem) == chat


def test_an_error_keeps_its_values_for_another_language_and_one_of_an_older_file_is_a_sentence(tmp_path: Path) -> None:
    store, failed = ChatStore(tmp_path), Chat.of(Turn("Hi"))
    failed.turns[0].error = Sentence("the prompt has {tokens} tokens", tokens="9,000")
    store.save(failed)
    again = store.load(failed.id).turns[0].error
    assert again is not None
    assert again == "the prompt has 9,000 tokens"
    assert again.to_json() == {"said": "the prompt has {tokens} tokens", "values": {"tokens": "9,000"}}
    path = tmp_path / f"{failed.id}.json"
    old = json.loads(path.read_text()) | {"format": 2}
    old["tree"][0]["error"] = "It failed."
    path.write_text(json.dumps(old))
    assert turn_json(chat := store.load(failed.id), chat.turns[0], None, TurnView())["error"] == {"said": "It failed."}


ODD = [
    {"updated": float("inf")}, {"created": 1e20}, {"updated": -1}, {"title": "half \ud800 a sign"}, {"tree": {}},
    {"tree": [{"user": "x", "after": "a1"}]}, {"tree": [{"user": "x", "id": "<b>"}]},
    {"tree": [{"user": "x", "id": "a1", "after": "a1"}]}, {"tree": [{"user": "x", "id": "a1"}] * 2},
    {"tree": [{"user": "x", "counts": {"new_tokens": 1}}]}, {"tree": [{"user": "x", "parts": [{"kind": "image"}]}]},
    {"tree": [{"user": "x", "parts": [{"kind": "text", "seconds": float("nan")}]}]}, {"settings": {"seed": 10**400}},
]  # fmt: skip


@pytest.mark.parametrize("changes", ODD)
def test_what_the_page_could_not_show_is_no_chat(tmp_path: Path, changes: dict[str, object]) -> None:
    store = ChatStore(tmp_path)
    store.save(CHAT)
    (tmp_path / f"{1:016x}.json").write_text(json.dumps(CHAT.to_json() | changes))
    assert [chat.id for chat in store.find()] == [CHAT.id]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_a_folder_and_a_huge_file_are_left_out_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ChatStore(tmp_path)
    store.save(CHAT)
    os.mkfifo(tmp_path / f"{1:016x}.json")
    (tmp_path / f"{2:016x}.json").mkdir()
    with (tmp_path / f"{3:016x}.json").open("wb") as huge:
        huge.truncate(1 << 40)
    (tmp_path / "notes.json").write_text("{}")
    for _ in range(2):
        assert [chat.id for chat in store.find()] == [CHAT.id]
    assert len(caplog.records) == 4
    assert "notes is not the name of a chat" in caplog.text
    assert "0000000000000003.json: this chat cannot be read: it is no file of at most 64 MiB" in caplog.text


def test_a_folder_that_takes_no_files_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/self/fd")):
        with pytest.raises(ChatError, match=r"cannot be kept here: .*; name another folder with --chats"):
            ChatStore(folder)


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GLM4LITE_CHATS", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ChatError, match="no home folder, so nothing can be kept; name another folder with --chats"):
        ChatStore()


def test_a_file_nested_too_deeply_is_damaged_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ChatStore(tmp_path)
    store.save(CHAT)
    (tmp_path / f"{1:016x}.json").write_text("[" * 200_000)
    assert [chat.id for chat in store.find()] == [CHAT.id]
    assert "0000000000000001.json: this chat cannot be read" in caplog.text


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_chat_that_could_not_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = ChatStore(tmp_path)
    store.save(CHAT)
    monkeypatch.setattr(step, full)
    with pytest.raises(ChatError, match="No space left"):
        store.save(CHAT)
    assert [path.name for path in tmp_path.iterdir()] == [f"{CHAT.id}.json"]


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "x", "0123456789abcdef/..", "0123456789ABCDEF"])
def test_a_strange_id_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    store = ChatStore(tmp_path)
    assert not store.holds(name)
    for use in (store.load, store.delete):
        with pytest.raises(ChatError, match="not the name of a chat"):
            use(name)


def test_searching_finds_all_words_in_questions_and_answers(tmp_path: Path) -> None:
    store = ChatStore(tmp_path)
    store.save(CHAT)
    assert store.find("37 FINE")
    assert not store.find("37 absent")


def test_the_model_reads_calls_results_and_files_but_not_what_was_dropped() -> None:
    read = messages(CHAT)
    assert [message.role for message in read] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert read[2].tool_calls == (ToolCall("call_1", "calculator", '{"expression": "37 * 24"}'),)
    assert read[3] == Message("tool", "888", tool_call_id="call_1", name="calculator")
    assert read[5].content == "And this?\n\nFile a.txt:\n````\none\n```\ntwo\n````"
    dropped = read_chat(CHAT.to_json())
    dropped.turns[0].dropped = True
    assert [message.role for message in messages(dropped)] == ["system", "user", "assistant"]


def test_calls_of_one_round_are_one_message_and_of_two_rounds_two() -> None:
    together = Turn("x", parts=[Part("call", 0, "1", "a", "{}", seconds=0), Part("call", 0, "2", "b", "{}", seconds=0)])
    apart = Turn("x", parts=[Part("call", 0, "1", "a", "{}", seconds=0), Part("call", 1, "2", "b", "{}", seconds=0)])
    assert [len(m.tool_calls) for m in messages(Chat.of(together)) if m.role == "assistant"] == [2]
    assert [len(m.tool_calls) for m in messages(Chat.of(apart)) if m.role == "assistant"] == [1, 1]


def test_events_become_parts_with_rounds_and_durations() -> None:
    turn, history = Turn("x"), [Message("user", "x")]
    writer = TurnWriter(turn, history)
    writer.write(Progress("prefill", 1, 2, "tokens"))
    for piece in ("Let me ", "think"):
        writer.write(ThinkingDelta(piece))
    writer.write(TextDelta("I'll look."))
    calls = (ToolCall("call_1", "a", '{"b":1}'), ToolCall("call_2", "a", "{}"))
    history += [Message("assistant", "I'll look.", calls)]
    for call in calls:
        writer.write(ToolCallStarted(call.id, call.name, {}))
        writer.write(ToolCallFinished(call.id, call.name, "", error=True))
    history += [Message("assistant", "", (ToolCall("call_3", "a", "{}"),))]
    writer.write(ToolCallStarted("call_3", "a", {}))
    writer.write(ToolCallFinished("call_3", "a", "3", error=False))
    writer.write(TextDelta("Done."))
    writer.write(Done(10, 5, "stop", 7.0, 3))
    assert [(part.kind, part.round) for part in turn.parts] == [
        ("thinking", 0), ("text", 0), ("call", 0), ("call", 0), ("call", 1), ("text", 2),
    ]  # fmt: skip
    assert turn.parts[0].text == "Let me think"
    assert turn.parts[2].arguments == '{"b":1}'
    assert all(part.seconds is not None for part in turn.parts)
    assert turn.counts == Counts(10, 5, "stop", 7.0, 3)


def test_thoughts_and_calls_say_whether_they_go_on_and_how_long_they_took() -> None:
    turn = Turn("x", parts=[Part("thinking", 0, "hm")])
    (thought,) = TurnView().parts(turn, under_way=True)
    assert thought["head"] == {"kind": "thinking", "open": True, "seconds": None}
    turn.parts[0].seconds = 1.234
    (thought,) = TurnView().parts(turn, under_way=True)
    assert thought["head"] == {"kind": "thinking", "open": False, "seconds": 1.234}
    call, text = TurnView().parts(CHAT.turns[0], under_way=False)
    assert (call["head"]["name"], call["head"]["failed"], call["results"]) == ("calculator", False, 1)
    assert "37 * 24" in call["blocks"][0]
    assert "888" in call["blocks"][1]
    assert text["blocks"] == list(blocks("888."))


def test_a_difference_is_the_last_blocks_and_makes_the_old_the_new() -> None:
    text, view, turn, told = "one\n\n```py\nx = 1\n```\n\n- a\n- b", TurnView(), Turn("x"), list[Any]()
    had: list[Any] = []
    turn.parts = [Part("thinking", 0, "")]
    for end in range(1, len(text) + 1):
        turn.parts[0].text = text[:end]
        now = view.parts(turn, under_way=True)
        for change in difference(had, now):
            assert len(change["blocks"]) <= 2
            del told[change["from"] :]
            told += change["blocks"]
        had = now
    assert told == list(blocks(text))
    turn.parts = []
    assert difference(had, view.parts(turn, under_way=False)) == [{"part": 0, "gone": True}]


def test_a_program_in_a_calls_arguments_is_shown_as_a_program() -> None:
    program, rest = arguments_blocks('{"code": "if x:\\n    y()", "timeout": 5}')
    assert 'data-language="python"' in program
    assert "\n    " in program
    assert "timeout" in rest
    assert arguments_blocks("no {json") == (
        '<div class="code"><div class="lines" tabindex="0" role="region" '
        'aria-label="code"><pre><code>no {json</code></pre></div></div>',
    )


def test_only_fences_called_html_or_svg_are_previewed_and_the_policy_comes_first() -> None:
    text = "```html\n<p>\n```\n```svg\n<svg></svg>\n```\n```xml\n<a/>\n```\n```python\n<svg>\n```\n```html\nopen"
    found = artifacts(Turn("x", parts=[Part("text", 0, text)]))
    assert [(one.kind, one.source) for one in found] == [("HTML", "<p>\n"), ("SVG", "<svg></svg>\n")]
    assert found[0].document().index("default-src 'none'") < found[0].document().index("<p>")


def test_every_artifact_of_a_chat_can_be_shown() -> None:
    drawn, plain = Part("text", 0, "```svg\n<svg></svg>\n```"), Part("text", 0, "Glad you like it.")
    page = Part("text", 0, "```html\n<title>A &lt;clock&gt;</title><script>x</script>\n```")
    found = artifacts_of(Chat.of(Turn("Draw", parts=[drawn]), Turn("Nice", parts=[plain]), Turn("And", parts=[page])))
    assert [(one["kind"], one["name"], one["scripts"]) for one in found] == [
        ("SVG", "picture", False),
        ("HTML", "A <clock>", True),
    ]


def test_exports_hold_the_conversation() -> None:
    text = as_markdown(CHAT)
    assert "## You\n\nWhat is 37 * 24?" in text
    assert "<summary>calculator</summary>" in text
    data = json.loads(as_json(CHAT))
    assert read_chat(data) == CHAT
    assert data["messages"][3] == {"role": "tool", "content": "888", "tool_call_id": "call_1", "name": "calculator"}
    assert file_name(Chat(title="../ä b?"), "md") == "ä-b.md"


def test_half_a_chat_of_a_killed_run_goes_and_one_that_is_being_saved_stays(tmp_path: Path) -> None:
    stale, fresh = tmp_path / ".a.json.0123abcd.part", tmp_path / ".b.json.0123abcd.part"
    for part in (stale, fresh):
        part.write_text("{")
    os.utime(stale, (time.time() - 7200,) * 2)
    ChatStore(tmp_path)
    assert not stale.exists()
    assert fresh.exists()


def test_a_question_says_what_the_system_cannot_limit() -> None:
    tool = Tool("python", "Runs code.", {}, print, needs_approval=True, caution="This system cannot limit: network.")
    question = asking_json(Asking(ToolCall("1", "python", "{}"), tool))
    assert question is not None
    assert question["name"] == "python"
    assert question["caution"] == {"said": "This system cannot limit: network."}
