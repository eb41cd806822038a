"""A chat is a tree: versions of answers and questions, the path shown, and answers that are gone on with."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from glm4lite.base.events import Done, TextDelta, ThinkingDelta, ToolCallFinished, ToolCallStarted
from glm4lite.base.sentences import Sentence
from glm4lite.engine.engine import Engine
from glm4lite.engine.sampling import SamplingParams
from glm4lite.engine.worker import EngineWorker
from glm4lite.text.messages import Message, ToolCall
from glm4lite.text.template import Begun, ChatTemplate
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from glm4lite_ui.answering import Answer, TurnWriter
from glm4lite_ui.chats import Attachment, Chat, ChatError, Counts, Part, Settings, Turn, read_chat
from glm4lite_ui.history import cut_answer, messages
from glm4lite_ui.models import Models
from glm4lite_ui.runtime import Runtime
from glm4lite_ui.saved.store import ChatStore
from tests.glm4lite.scripted import scripted_engine
from tests.ui.slow_model import slow_engine

CUT = Counts(10, 4, "length", 1.0, 10)


def answered(turn: Turn, text: str) -> Turn:
    turn.parts = [Part("text", 0, text, seconds=0.1)]
    return turn


def said(chat: Chat) -> list[str]:
    return [f"{turn.user}: {''.join(part.text for part in turn.parts)}" for turn in chat.turns]


def conversation() -> Chat:
    return Chat.of(*(answered(Turn(f"q{n}"), f"a{n}") for n in (1, 2, 3)))


def test_a_regenerated_answer_keeps_the_old_one_with_all_that_followed() -> None:
    chat = conversation()
    old = chat.turns[1]
    new = answered(chat.another(old), "b2")
    assert said(chat) == ["q1: a1", "q2: b2"]
    assert chat.versions(new) == [old, new]
    chat.show(old)
    assert said(chat) == ["q1: a1", "q2: a2", "q3: a3"]


def test_an_edited_question_is_another_version_too_and_keeps_its_files() -> None:
    chat = Chat.of(answered(Turn("q1", [Attachment("a.txt", "x", 1)]), "a1"))
    edited = chat.another(chat.turns[0], "other")
    assert (edited.user, edited.files) == ("other", [Attachment("a.txt", "x", 1)])
    assert [turn.user for turn in chat.versions(edited)] == ["q1", "other"]
    assert chat.another(answered(edited, "a"), files=[]).files == []


def test_each_fork_remembers_what_was_shown_behind_it_also_after_saving(tmp_path: Path) -> None:
    chat, store = conversation(), ChatStore(tmp_path)
    second, third = chat.turns[1:]
    answered(chat.another(third), "b3")
    chat.show(third)
    answered(chat.another(second), "b2")
    answered(chat.ask("q4"), "a4")
    assert said(chat) == ["q1: a1", "q2: b2", "q4: a4"]
    store.save(chat)
    chat = store.load(chat.id)
    assert said(chat) == ["q1: a1", "q2: b2", "q4: a4"]
    chat.show(chat.find(second.id))
    assert said(chat) == ["q1: a1", "q2: a2", "q3: a3"]


def test_a_version_deep_in_another_branch_is_shown_with_the_way_to_it() -> None:
    chat = conversation()
    first, deep = chat.turns[0], chat.turns[2]
    answered(chat.another(first), "b1")
    chat.show(deep)
    assert said(chat) == ["q1: a1", "q2: a2", "q3: a3"]


def test_a_question_that_nothing_answered_is_not_kept_as_a_version() -> None:
    chat = conversation()
    failed = chat.ask("q4")
    failed.error = Sentence("It failed.")
    again = chat.another(failed)
    assert chat.versions(again) == [again]
    assert again.error is None


def test_a_removed_turn_leaves_what_followed_it() -> None:
    chat = conversation()
    chat.remove(chat.turns[1])
    assert said(chat) == ["q1: a1", "q3: a3"]
    chat.remove(chat.turns[0])
    chat.remove(chat.turns[0])
    assert chat.turns == ()


@pytest.mark.parametrize("shown", [0, 1, 2])
@pytest.mark.parametrize("removed", [0, 1, 2])
def test_removing_a_version_changes_only_a_path_that_leads_through_it(shown: int, removed: int) -> None:
    chat = Chat.of(answered(Turn("q1"), "v0"))
    for name in ("v1", "v2"):
        answered(chat.another(chat.turns[0]), name)
    versions = chat.versions(chat.turns[0])
    for turn in versions:  # what follows was made in another order than what it follows
        chat.show(versions[(versions.index(turn) + 1) % 3])
        answered(chat.ask("then"), f"behind {versions[(versions.index(turn) + 1) % 3].parts[0].text}")
    chat.show(versions[shown])
    before = said(chat)
    chat.remove(versions[removed])
    assert said(chat) == (before[1:] if shown == removed else before)
    assert read_chat(chat.to_json()) == chat


def test_a_removed_last_version_shows_the_one_before_it() -> None:
    chat = conversation()
    third = chat.turns[2]
    for name in ("b3", "c3"):
        answered(chat.another(third), name)
    chat.remove(chat.turns[2])
    assert said(chat)[-1] == "q3: b3"
    chat.show(third)
    chat.remove(third)
    assert said(chat)[-1] == "q3: b3"


def test_a_branch_is_a_chat_of_its_own_with_the_path_up_to_a_turn() -> None:
    chat = conversation()
    chat.settings.system = "Be brief."
    answered(chat.another(chat.turns[1]), "b2")
    branch = chat.branch(chat.turns[1])
    assert branch.id != chat.id
    assert said(branch) == ["q1: a1", "q2: b2"]
    assert len(branch.tree) == 2
    branch.settings.system = branch.turns[0].parts[0].text = "changed"
    assert chat.settings.system == "Be brief."
    assert said(chat) == ["q1: a1", "q2: b2"]


def test_a_turn_that_is_gone_is_said() -> None:
    with pytest.raises(ChatError, match="this turn is not there any more"):
        conversation().find("abc")


def test_the_model_reads_the_path_shown() -> None:
    chat = conversation()
    chat.another(chat.turns[1], "other")
    assert [message.content for message in messages(chat)] == ["q1", "a1", "other"]


@pytest.mark.parametrize(
    ("turn", "cut"),
    [
        (Turn("x", parts=[Part("text", 0, "So", seconds=1)], counts=CUT), True),
        (Turn("x", parts=[Part("thinking", 0, "Hm", seconds=1)], counts=CUT), True),
        (Turn("x", parts=[Part("text", 0, "So", seconds=1)], counts=Counts(1, 1, "stop", 1.0, 1)), False),
        (Turn("x", parts=[Part("text", 0, "So", seconds=1)]), False),
        (Turn("x", parts=[Part("text", 0, "\n", seconds=1)], counts=CUT), False),
        (Turn("x", parts=[Part("call", 0, name="f", arguments="{}")], counts=CUT), False),
        (Turn("x", counts=CUT), False),
    ],
)
def test_only_an_answer_that_was_cut_in_what_it_said_can_be_gone_on_with(turn: Turn, cut: bool) -> None:
    assert turn.cut is cut


def test_a_cut_answer_is_read_with_the_rounds_before_it() -> None:
    call = Part("call", 0, "888", "calculator", '{"expression": "37 * 24"}', seconds=0.01)
    parts = [call, Part("thinking", 1, "Hm", seconds=1), Part("text", 1, "It is", seconds=1)]
    chat = Chat.of(
        answered(Turn("Hi"), "Hello"), Turn("37 * 24?", parts=parts, counts=CUT), settings=Settings("Brief.")
    )
    read, begun = cut_answer(chat)
    assert read == [
        Message("system", "Brief."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "37 * 24?"),
        Message("assistant", "", (ToolCall("call_1", "calculator", '{"expression": "37 * 24"}'),)),
        Message("tool", "888", tool_call_id="call_1", name="calculator"),
    ]  # fmt: skip
    assert begun == Begun("It is", "Hm")


def test_events_tell_the_last_round_anew_and_its_time_counts_on() -> None:
    call = Part("call", 0, "888", "calculator", "{}", seconds=0.01)
    turn = Turn("x", parts=[call, Part("text", 1, "So it\ncalcu", seconds=5.0)], counts=CUT)
    history = [Message("assistant", "", (ToolCall("call_1", "calculator", "{}"),))]
    writer = TurnWriter(turn, history)
    assert turn.parts[1].text == "So it\ncalcu"
    writer.write(TextDelta("So it"))
    assert [part.text for part in turn.parts] == ["888", "So it"]
    history.append(Message("assistant", "So it", (ToolCall("call_1", "calculator", "{}"),)))
    writer.write(ToolCallStarted("call_1", "calculator", {}))
    writer.write(ToolCallFinished("call_1", "calculator", "1", error=False))
    writer.write(ThinkingDelta("Hm"))
    writer.write(Done(10, 5, "stop", 7.0, 3))
    assert [(part.kind, part.round) for part in turn.parts] == [
        ("call", 0), ("text", 1), ("call", 1), ("thinking", 2),
    ]  # fmt: skip
    assert turn.parts[1].seconds is not None
    assert turn.parts[1].seconds >= 5
    assert not turn.cut


def answer(runtime: Runtime, chat: Chat, resume: bool = False) -> Answer:
    under_way = runtime.answer(chat, resume=resume)
    assert under_way.over.wait(30)
    return under_way


def test_an_answer_goes_on_where_it_was_cut_and_ends_as_the_whole_one(nano: Engine, tmp_path: Path) -> None:
    runtime = Runtime(EngineWorker(nano), ChatStore(tmp_path), BUILTIN_TOOLS)
    whole = Chat(settings=Settings(temperature=0))
    whole.ask("What is 37 * 24?")
    answer(runtime, whole)
    assert whole.turns[0].parts[-1].text == "37 * 24 = 888."
    chat = Chat(settings=Settings(temperature=0, max_new_tokens=6))
    chat.ask("What is 37 * 24?")
    answer(runtime, chat)
    rounds = 1
    while chat.turns[0].cut:  # first in its call, later in its words
        before = len(chat.turns[0].parts)
        answer(runtime, chat, resume=True)
        assert len(chat.turns[0].parts) >= before
        rounds += 1
    assert rounds > 2
    assert [(part.kind, part.round, part.text) for part in chat.turns[0].parts] == [
        (part.kind, part.round, part.text) for part in whole.turns[0].parts
    ]
    assert messages(chat) == messages(whole)
    assert runtime.store.load(chat.id) == chat
    runtime.close()


def test_an_answer_that_cannot_go_on_stays_as_it_was(nano: Engine, tmp_path: Path) -> None:
    runtime = Runtime(EngineWorker(nano), ChatStore(tmp_path))
    chat = Chat.of(Turn("x " * nano.model.context, parts=[Part("text", 0, "So", seconds=1)], counts=CUT))
    assert answer(runtime, chat, resume=True).context_full
    assert chat.turns[0].parts == [Part("text", 0, "So", seconds=1)]
    assert "context" in (chat.turns[0].error or "")
    assert chat.turns[0].cut
    chat.turns[0].counts = Counts(1, 1, "stop", 1.0, 1)
    with pytest.raises(ChatError, match="this answer is whole"):
        runtime.answer(chat, resume=True)
    runtime.close()


def test_a_stopped_answer_goes_on(nano: Engine, tmp_path: Path) -> None:
    runtime = Runtime(EngineWorker(slow_engine(nano, "word " * 300, 0.01)), ChatStore(tmp_path))
    chat = Chat()
    turn = chat.ask("Write")
    under_way = runtime.answer(chat)
    deadline = time.monotonic() + 10
    while not turn.parts and time.monotonic() < deadline:
        time.sleep(0.01)
    under_way.stop()
    assert under_way.over.wait(10)
    stopped = turn.parts[0].text
    assert turn.cut
    answer(runtime, chat, resume=True)
    assert turn.parts[0].text.startswith(stopped)
    assert len(turn.parts[0].text) > len(stopped)
    runtime.close()


def test_an_answer_may_be_as_long_as_the_context_unless_the_chat_says_otherwise(nano: Engine, tmp_path: Path) -> None:
    runtime = Runtime(EngineWorker(nano), ChatStore(tmp_path))
    assert runtime.params(Settings()).max_new_tokens is None
    chosen = Settings(temperature=0.5, top_k=3, min_p=0.1, repetition_penalty=1.1, max_new_tokens=7, stop=["x"], seed=1)
    params = SamplingParams(0.5, 3, runtime.params(Settings()).top_p, 0.1, 1.1, 1, ("x",), 7)
    assert runtime.params(chosen) == params
    runtime.close()


THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1] }}{% endfor %}<|assistant|>\n<think>"
)


def test_a_thought_ends_at_the_chats_budget_also_when_its_answer_is_gone_on_with(nano: Engine, tmp_path: Path) -> None:
    tokenizer, thought = nano.tokenizer, "\nOne, two, three, four"
    kept = [tokenizer.text(tokenizer.ids(thought)[:count]) for count in (3, 6, 7)]
    replies = [kept[0] + " five", kept[1].removeprefix(kept[0]) + " Four.<|user|>"]
    runtime = Runtime(
        EngineWorker(scripted_engine(tokenizer, ChatTemplate(THINKING), replies)), ChatStore(tmp_path), BUILTIN_TOOLS
    )
    chat = Chat(settings=Settings(max_new_tokens=3, thinking_budget=6))
    turn = chat.ask("2 + 2?")
    answer(runtime, chat)
    assert (turn.cut, [(part.kind, part.text) for part in turn.parts]) == (True, [("thinking", kept[0].lstrip())])
    model = runtime.engine.model
    model.left.clear()  # type: ignore[operator, union-attr]  # what the scripted model did not come to say
    chat.settings = Settings(thinking_budget=6)
    answer(runtime, chat, resume=True)
    assert [(part.kind, part.text) for part in turn.parts] == [("thinking", kept[1].lstrip() + "\n"), ("text", "Four.")]
    assert turn.counts is not None
    assert turn.counts.finish_reason == "stop"
    runtime.close()


def test_a_budget_waits_for_a_model_that_thinks(nano: Engine, tmp_path: Path) -> None:
    runtime = Runtime(EngineWorker(nano), ChatStore(tmp_path))
    assert runtime.params(Settings(thinking_budget=5)).thinking_budget is None
    assert Models(runtime, lambda told: None).about()["thinks"] is False
    runtime.close()
