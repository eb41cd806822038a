"""What is typed in a conversation: commands, files, settings, saved chats; the model says what it is told."""

from __future__ import annotations

import json
import os
import stat
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import glm4lite
from glm4lite.base.errors import Glm4liteError
from glm4lite.base.events import Done, Event, TextDelta, ThinkingDelta
from glm4lite.base.user_folder import chats_folder
from glm4lite.chat.session import ChatSession
from glm4lite.cli.app import main
from glm4lite.cli.chat import saved, slash_commands
from glm4lite.cli.chat.conversation import Conversation, Source
from glm4lite.cli.chat.keyboard import Typed, unfinished, unquoted
from glm4lite.cli.chat.loop import converse
from glm4lite.cli.chat.mentions import completions, with_files
from glm4lite.cli.chat.settings import Settings
from glm4lite.cli.markdown import last_block
from glm4lite.cli.terminal import Renderer, ending
from glm4lite.engine.engine import Engine
from glm4lite.loading.load_options import LoadOptions
from glm4lite.text.messages import Message
from glm4lite.text.template import ChatTemplate
from glm4lite.text.tokenizer import Tokenizer
from glm4lite.tools.builtin.tools import BUILTIN_TOOLS
from tests.glm4lite.scripted import ScriptedModel, scripted_engine

NANO = Path(glm4lite.__file__).parent / "nano"
THINKING = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)


class Heard(Renderer):
    """A renderer that keeps what it is told."""

    markdown = True

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.text = self.thought = ""
        self.ending: Callable[[Done], str] = ending

    def show(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self.text += event.text
        elif isinstance(event, ThinkingDelta):
            self.thought += event.text
        elif isinstance(event, Done) and (said := self.ending(event)):
            self.remarks.append(said)

    def remark(self, text: str) -> None:
        self.remarks.append(text)

    def drawn_with(self, shown: str) -> str:
        return ""

    def end_line(self) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """A keyboard at which these are typed."""

    def __init__(self, *lines: str | Typed, by_hand: bool = True) -> None:
        self._left = [line if isinstance(line, Typed) else Typed(line, by_hand=by_hand) for line in lines]

    def read(self) -> Typed | None:
        return self._left.pop(0) if self._left else None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NANO)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    found = ChatTemplate.from_folder(NANO)
    assert found is not None
    return found


Talk = Callable[..., Conversation]


@pytest.fixture
def talk(tokenizer: Tokenizer, template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """A conversation on a scripted model, in a folder and with a user's data of its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)

    def begin(*replies: str, of: ChatTemplate | None = None, by_hand: bool = True, **sampling: Any) -> Conversation:
        engine = scripted_engine(tokenizer, of or template, [f"\n{reply}<|user|>" for reply in replies])
        session, heard = ChatSession(engine, BUILTIN_TOOLS, None, engine.params(**sampling)), Heard()
        settings = Settings(session, heard, tuple(BUILTIN_TOOLS), sampling)
        source = Source("nano", LoadOptions("auto"))
        return Conversation(session, heard, source, settings, tuple(BUILTIN_TOOLS), by_hand)

    return begin


def heard(found: Conversation) -> Heard:
    assert isinstance(found.renderer, Heard)
    return found.renderer


def limit(found: Conversation, context: int) -> None:
    """The model takes so many tokens from now on."""
    model: Any = found.session.engine.model
    assert isinstance(model, ScriptedModel)
    model.context = context


def remarks(found: Conversation) -> str:
    return "\n".join(heard(found).remarks)


def asked(found: Conversation) -> list[str]:
    return [message.content for message in found.session.messages if message.role == "user"]


# --- what is a command


@pytest.mark.parametrize(
    ("text", "is_command"),
    [
        ("/set temperature 1", True),
        ("/load the truck", True),
        ("/help", True),
        ("/?", True),
        ('/set system """a\nb"""', True),
        ("/help me with this", False),
        ("/reset the router?", False),
        ("/etc/hosts is what?", False),
        ("/set x\nand another line", False),
        ("/setter", False),
        ("set temperature 1", False),
    ],
)
def test_what_begins_with_a_slash(text: str, is_command: bool) -> None:
    assert (slash_commands.of(text, by_hand=True) is not None) == is_command


def test_piped_lines_know_the_few_commands_they_always_knew(talk: Talk) -> None:
    found = talk("one", "two", by_hand=False)
    converse(found, Lines("/set temperature 1", "/save x.json", "/reset", "/exit", "never", by_hand=False))
    assert asked(found) == []
    assert heard(found).text == "onetwo"
    assert not Path("x.json").exists()


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("/lod trip", "/load"),
        ("/st temperature 1", "/set"),
        ("/modl x", "/model"),
        ("/rset", "/reset"),
        ("/exitt the room?", None),  # no command takes these words
        ("/etc/hosts is what?", None),
        ("/tmp is full", None),
        ("/lod trip\nis a line of a program", None),
        ('"""/lod trip"""', None),
    ],
)
def test_what_is_nearly_a_command_is_no_question(text: str, near: str | None, talk: Talk) -> None:
    found = talk("Yes.")
    converse(found, Lines(text))
    assert len(asked(found)) == (near is None)
    assert near is None or f"is not a command and was not sent; is it {near}?" in remarks(found)


def test_the_help_fits_a_terminal_of_80_columns(talk: Talk) -> None:
    found = talk()
    converse(found, Lines("/help"))
    assert max(map(len, remarks(found).splitlines())) <= 80


def test_every_command_is_in_the_help(talk: Talk) -> None:
    found = talk()
    converse(found, Lines("/help"))
    listed = {line.split()[0] for line in remarks(found).splitlines() if line.startswith("/")}
    assert listed >= set(slash_commands.COMMANDS) - {"/?", "/clear", "/quit", "/bye"}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/se", ["/set"]),
        ("/set te", ["temperature"]),
        ("/set tools ", ["off", "on"]),
        ("/set tools o", ["off", "on"]),
        ("/load s", ["sums"]),
        ("/load two w", ["two words"]),
        ("/model na", ["nano"]),
        ("/model f", ["folder"]),
        ("look at @no", ["notes.txt"]),
        ("look at @folder/", ["folder/in.md"]),
        ('look at @"my', ['"my file.txt"']),
        ("look at @my", ['"my file.txt"']),
        ("mail a@no", []),
        ("/tmp @no", ["notes.txt"]),
    ],
)
def test_what_is_offered(typed: str, offered: list[str], talk: Talk) -> None:
    found = talk("Hi")
    for name in ("notes.txt", "my file.txt", ".hidden", "folder/in.md"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    converse(found, Lines("Hello", "/save sums", "/save two words"))
    assert sorted(text for text, _ in slash_commands.offers(found, typed)) == offered
    for text, start in slash_commands.offers(found, typed):
        assert typed[: len(typed) + start] + text  # what is typed is replaced, and nothing before it


# --- several lines


@pytest.mark.parametrize(
    ("text", "goes_on", "inside"),
    [
        ('"""a', True, '"""a'),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\n  a\n"""', False, "  a"),
        ('"""Doc."""\nx = """y"""', False, '"""Doc."""\nx = """y"""'),
        ('say """a', False, 'say """a'),
        ('/set system """a', True, '/set system """a'),
        ('""""""', False, ""),
    ],
)
def test_a_block_goes_on_until_it_is_closed(text: str, goes_on: bool, inside: str) -> None:
    assert unfinished(text) == goes_on
    assert unquoted(text) == inside


# --- files


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "my notes.txt", "plain"):
        Path(name).write_text("heron")
    return "\n\nFile notes.txt:\n```\nheron\n```"


@pytest.mark.parametrize(
    "text",
    [
        "mail me: a@b.c or x@notes.txt",
        '"@notes.txt"',
        "`@notes.txt`",
        "@dataclass\nclass A: ...",
        '@app.route("/x")\ndef f(): ...',
        "@someone said so",
        "an @ alone, and @",
    ],
)
def test_what_names_no_file_is_left_as_it_is(text: str, notes: str) -> None:
    assert with_files(text) == text


def test_files_are_added_once_under_their_names(notes: str) -> None:
    assert with_files("Compare @notes.txt, (@notes.txt) and @@notes.txt.") == (
        "Compare notes.txt, (notes.txt) and @notes.txt." + notes
    )
    assert with_files('See @"my notes.txt"!').startswith("See my notes.txt!\n\nFile my notes.txt:")
    assert with_files("See @plain").endswith("File plain:\n```\nheron\n```")
    assert with_files(f"See @{Path('notes.txt').resolve()}").endswith(notes)


def test_what_was_pasted_names_no_file(notes: str) -> None:
    paste = "@notes.txt\n@missing.txt"
    assert with_files(f"Explain:\n{paste}\nand @notes.txt", [paste]) == f"Explain:\n{paste}\nand notes.txt{notes}"


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "folder/", "~nobody/x.txt", '"my other.txt"'])
def test_a_file_that_is_missing_is_refused(name: str, notes: str) -> None:
    Path("folder").mkdir()
    with pytest.raises(Glm4liteError, match=r"cannot be read: .* \(@@ writes an @ that names no file\)"):
        with_files(f"See @{name}")


def test_a_refused_file_asks_nothing(talk: Talk) -> None:
    found = talk("never")
    converse(found, Lines("See @gone.txt"))
    assert asked(found) == []
    assert "error: gone.txt cannot be read" in remarks(found)


def test_a_file_that_p_names_and_is_missing_is_one_line(
    notes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["glm4lite", "chat", "-p", "Read @gone.txt"])
    with pytest.raises(SystemExit) as left:
        main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (left.value.code, line.split(" (")[0]) == (2, "error: gone.txt cannot be read: No such file or directory")


def test_what_a_model_or_a_pipe_says_names_no_file(talk: Talk, notes: str) -> None:
    found = talk("See @notes.txt", "Yes")
    converse(found, Lines("Hello @notes.txt", by_hand=False))
    assert asked(found) == ["Hello @notes.txt"]
    assert found.session.messages[-1].content == "See @notes.txt"


def test_completions_of_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(300):
        (tmp_path / f"f{number}").touch()
    (tmp_path / "f\x1b[2J").touch()
    found = [text for text, _ in completions("@f")]
    assert len(found) in (199, 200)  # the odd name may be among those that were looked at
    assert all(text.isprintable() for text in found)


# --- settings


def test_settings_are_in_force_and_shown(talk: Talk) -> None:
    found = talk("Hi", top_p=0.5)
    converse(
        found,
        Lines(
            "/set temperature 0.7", "/set seed 7", '/set stop " end"', "/set max-new-tokens 99", "/set system Be brief."
        ),
    )
    params = found.session.params
    assert (params.temperature, params.top_p, params.seed, params.stop) == (0.7, 0.5, 7, (" end",))
    assert params.max_new_tokens == 99
    assert found.session.messages == [Message("system", "Be brief.")]
    shown = dict(found.lines())
    assert (shown["temperature"], shown["seed"], shown["system"], shown["stop"]) == ("0.7", "7", "Be brief.", "' end'")
    assert shown["top_k"] == "0 (the checkpoint's)"
    converse(found, Lines("/set temperature default", "/set top_p default", "/set system default", "/set seed default"))
    assert found.session.params.temperature == 0  # the scripted checkpoint's
    assert found.session.params.top_p == 0.5  # given at the start
    assert (found.session.messages, found.session.params.seed) == ([], None)


def test_a_setting_that_cannot_be_changes_nothing(talk: Talk) -> None:
    found = talk()
    before = found.session.params
    converse(
        found, Lines("/set temperature -1", "/set seed 1.5", "/set tools maybe", "/set nothing 1", "/set top_p nan")
    )
    assert found.session.params == before
    assert remarks(found).count("error: ") == 5


def test_tools_can_be_switched_off(talk: Talk) -> None:
    found = talk()
    converse(found, Lines("/set tools off"))
    assert found.session.tools == {}
    assert "calculator: off; Evaluate" in "\n".join(found.tool_lines())
    converse(found, Lines("/set tools on", "/set markdown off"))
    assert list(found.session.tools) == [tool.name for tool in BUILTIN_TOOLS]
    assert found.renderer.markdown is False


def test_a_thinking_model_can_be_made_to_answer_at_once(talk: Talk) -> None:
    found = talk("Well.</think>\n\nFour.", "Five.", "Hm.</think>\n\nSix.", of=ChatTemplate(THINKING))
    converse(found, Lines("2 + 2?", "/set think off", "2 + 3?", "/set think on", "2 + 4?"))
    model: Any = found.session.engine.model
    passes = [found.session.engine.tokenizer.text(ids) for ids in model.fed]
    ended = [place for place, text in enumerate(passes) if text == "\n</think>\n\n"]
    assert [passes[place - 1].endswith("2 + 3?\n<think>") for place in ended] == [True]
    assert [message.content for message in found.session.messages if message.role == "assistant"] == [
        "Four.",
        "Five.",
        "Six.",
    ]


def test_a_thinking_budget_is_set_shown_and_given_back(talk: Talk) -> None:
    found = talk("Hm.</think>\n\nFour.", of=ChatTemplate(THINKING), thinking_budget=9)
    assert dict(found.lines())["thinking_budget"] == "9"
    converse(found, Lines("/set thinking_budget 3", "/set think off"))
    assert (found.session.params.thinking_budget, dict(found.lines())["think"]) == (0, "off")
    converse(found, Lines("/set think on"))
    assert (found.session.params.thinking_budget, dict(found.lines())["think"]) == (9, "on")
    converse(found, Lines("/set think 12"))
    assert (found.session.params.thinking_budget, dict(found.lines())["think"]) == (12, "on")
    converse(found, Lines("/set thinking_budget default", "/set thinking_budget -3"))
    assert found.session.params.thinking_budget == 9
    assert "error: thinking_budget must be a whole number at least 0" in remarks(found)


def test_a_model_that_does_not_think_says_so_and_a_budget_waits_for_one_that_does(
    talk: Talk, tokenizer: Tokenizer, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = talk("Four.")
    converse(found, Lines("/set thinking_budget 3", "/set think on", "/set thinking_budget 0", "/set think off"))
    assert [line[:6] for line in remarks(found).splitlines() if "not think" in line] == ["error:"] * 2
    engines = [scripted_engine(tokenizer, ChatTemplate(THINKING), []), scripted_engine(tokenizer, template, [])]
    monkeypatch.setattr(Engine, "from_options", lambda *_, **__: engines.pop(0))
    converse(found, Lines("/model nano", "/set thinking_budget 3", "/model nano"))
    assert found.session.params.thinking_budget is None
    assert remarks(found).count("(this model does not think: the thinking budget changes nothing)") == 1
    assert found.settings.sampling["thinking_budget"] == 3


# --- an answer that was cut


def cut_at(found: Conversation, tokens: int, *lines: str) -> None:
    """The scripted model would say what is left of its reply to whoever asks next: as one that goes on does."""
    converse(found, Lines(f"/set max_new_tokens {tokens}", *lines))


@pytest.mark.parametrize("of", [None, ChatTemplate(THINKING)], ids=["text", "thought"])
def test_continue_shows_the_rest_of_an_answer_until_it_is_whole(talk: Talk, of: ChatTemplate | None) -> None:
    thought = "" if of is None else "Let me see, said she.</think>\n\n"
    found = talk(f"{thought}Two and two make four, as everybody knows.", of=of)
    cut_at(found, 8, "2 + 2?")
    assert remarks(found).endswith("(the answer was cut at 8 tokens; /continue goes on)")
    while found.session.cut is not None:
        cut_at(found, 8, "/continue")
    assert heard(found).text == "Two and two make four, as everybody knows."
    thought = heard(found).thought.partition("<")[0]  # a cut within the tag shows its beginning
    assert thought == ("" if of is None else "Let me see, said she.")
    assert found.session.messages == [
        Message("user", "2 + 2?"),
        Message("assistant", "Two and two make four, as everybody knows."),
    ]
    converse(found, Lines("/continue"))
    assert remarks(found).endswith("error: there is no answer to go on with: the last one is whole")


def test_where_markdown_is_drawn_the_last_block_is_drawn_again(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = "So:\n\n```python\nx = 1\ny = 2\n```\n\nDone."
    found = talk(reply)
    monkeypatch.setattr(found.renderer, "drawn_with", last_block)
    cut_at(found, 14, "Code?")
    shown = heard(found).text
    assert shown.startswith("So:\n\n```python\nx")
    cut_at(found, 99, "/continue")
    assert heard(found).text == shown + reply.removeprefix("So:\n\n")


def test_a_call_that_was_cut_runs_when_it_is_continued(talk: Talk) -> None:
    found = talk('Let me see.\ncalculator\n{"expression": "37 * 24"}', "It is 888.")
    cut_at(found, 14, "37 * 24?")
    assert "calculator" in heard(found).text
    shown = len(heard(found).text)
    cut_at(found, 100, "/continue")
    assert heard(found).text[shown:] == "It is 888."
    assert [message.role for message in found.session.messages] == ["user", "assistant", "tool", "assistant"]


def test_what_cannot_be_continued_stays_and_can_be_after_room_was_made(talk: Talk) -> None:
    found = talk("Two and two make four.")
    converse(found, Lines("/continue"))
    cut_at(found, 5, "2 + 2?")
    before, cut = list(found.session.messages), found.session.cut
    limit(found, 10)
    converse(found, Lines("/continue", "What?"))
    assert remarks(found).count("error: the prompt has") == 2
    assert (found.session.messages, found.session.cut) == (before, cut)
    limit(found, 4096)
    cut_at(found, 99, "/continue")
    assert found.session.messages[-1].content == "Two and two make four."


@pytest.mark.parametrize("command", ["/reset", "/load other"])
def test_another_conversation_has_no_answer_to_continue(talk: Talk, command: str) -> None:
    other = saved.Saved([Message("user", "Hi"), Message("assistant", "Ho")], title="other")
    saved.save(saved.place_for("other", None), other)
    found = talk("Two and two make four.")
    cut_at(found, 5, "2 + 2?", command)
    assert found.session.cut is None


def test_a_context_that_is_full_promises_nothing(talk: Talk) -> None:
    found = talk("word " * 100)
    limit(found, 200)
    converse(found, Lines("Write"))
    assert remarks(found).endswith("tokens: the model's context is full)")


# --- saved conversations


def test_what_is_saved_comes_back(talk: Talk) -> None:
    first = talk("Hello.", seed=3)
    converse(
        first,
        Lines("/set system Be brief.", "Hi", "/set temperature 0.25", "/save my chat", "/save", "/save there.json"),
    )
    second = talk("Again.")
    converse(second, Lines("/load my chat", "And?"))
    assert second.session.messages[:3] == first.session.messages
    assert second.session.system == "Be brief."
    assert (second.session.params.temperature, second.session.params.seed) == (0.25, 3)
    assert json.loads(Path("there.json").read_text())["messages"][1] == {"role": "user", "content": "Hi"}
    converse(second, Lines("/save my chat"))  # the one it was loaded from
    assert "error" not in remarks(second)
    if os.name == "posix":
        (kept,) = chats_folder().glob("*.json")
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def test_nothing_is_overwritten_or_saved_empty(talk: Talk) -> None:
    Path("other.json").write_text("{}")
    found = talk("Hi")
    converse(found, Lines("/save a", "Hello", "/save other.json", "/save missing/a.json", "/save ..."))
    assert Path("other.json").read_text() == "{}"
    nothing, there, missing, name = [line for line in remarks(found).splitlines() if line.startswith("error: ")]
    assert nothing == "error: there is nothing to save yet"
    assert there == "error: other.json is there already; take another name or delete it"
    assert missing == "error: missing/a.json cannot be written: No such file or directory"
    assert "is no name for a conversation" in name


def test_a_name_belongs_to_one_conversation_and_the_newest_of_a_title_is_loaded(talk: Talk) -> None:
    first, second = talk("One."), talk("Two.")
    converse(first, Lines("First?", "/save trip"))
    converse(second, Lines("Second?", "/save trip", "/save other", "/save trip to Rome"))
    assert remarks(second).count("error: another conversation is called trip; take another name") == 1
    assert saved.titles() == ["trip to Rome", "other", "trip"]
    for file in chats_folder().glob("*.json"):
        file.write_text(file.read_text().replace('"title": "other"', '"title": "trip"'))
    third = talk()
    converse(third, Lines("/load trip", "/load", "/load Trip"))
    assert asked(third) == ["Second?"]
    assert "\ntrip to Rome\ntrip\ntrip\n" in remarks(third)
    assert remarks(third).endswith("error: 'Trip' is not saved; /load alone lists what is")


def test_messages_of_another_program_are_loaded_and_its_file_is_left_alone(talk: Talk) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = json.dumps({"model": "gpt", "messages": messages, "tools": []})
    Path("request.json").write_text(text)
    found = talk("Bye.")
    converse(found, Lines("/load request.json", "Bye", "/save", "/save request.json"))
    assert asked(found) == ["Hi", "Bye"]
    assert remarks(found).count("error: ") == 2
    assert Path("request.json").read_text() == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "bad.json must hold a JSON object"),
        ("{", "is not valid JSON"),
        ('{"format": 1, "turns": []}', "holds no list of messages"),
        ('{"messages": {}}', "holds no list of messages"),
        ('{"messages": [{"role": "x"}]}', "role must be one of"),
        ('{"messages": [], "settings": []}', "no object of settings"),
        ('{"messages": [], "settings": {"temperature": "x"}}', "'temperature': 'x', which cannot be used"),
        ('{"messages": [], "settings": {"stop": [1]}}', "'stop': [1], which cannot be used"),
    ],
    ids=str,
)
def test_a_file_that_is_no_conversation_changes_nothing(content: str, said: str, talk: Talk) -> None:
    Path("bad.json").write_text(content)
    found = talk("Hello.")
    converse(found, Lines("Hi", "/load bad.json"))
    assert asked(found) == ["Hi"]
    (line,) = [line for line in remarks(found).splitlines() if line.startswith("error: ")]
    assert said in line


# --- another model


def test_the_old_model_is_gone_before_the_new_ones_weights_are_read(
    talk: Talk, tokenizer: Tokenizer, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = talk("One.", top_p=0.5)
    old = weakref.ref(found.session.engine.model)
    seen = []

    def load(source: str, *_: Any, before_weights: Callable[[], None], **__: Any) -> Engine:
        before_weights()
        seen.append(old() is None)
        made = scripted_engine(tokenizer, template, ["\nTwo.<|user|>"])
        made.generation_config["top_k"] = 9
        return made

    monkeypatch.setattr(Engine, "from_options", load)
    converse(found, Lines("First?", "/model nano int8", "Second?"))
    assert seen == [True]
    assert asked(found) == ["First?", "Second?"]
    assert heard(found).text == "One.Two."
    assert (found.source.options.quant, found.session.params.top_k, found.session.params.top_p) == ("int8", 9, 0.5)


@pytest.mark.parametrize("error", [Glm4liteError("a shard is damaged"), MemoryError(), KeyboardInterrupt()])
def test_the_old_model_comes_back_where_the_new_one_fails(
    error: BaseException, talk: Talk, tokenizer: Tokenizer, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = talk("One.")

    def load(source: str, options: LoadOptions, before_weights: Callable[[], None] | None, **_: Any) -> Engine:
        if options.quant == "int8":
            assert before_weights
            before_weights()
            raise error
        return scripted_engine(tokenizer, template, ["\nTwo.<|user|>"])

    monkeypatch.setattr(Engine, "from_options", load)
    converse(found, Lines("First?", "/model nano int8", "Second?"))
    assert "; nano is loaded again" in remarks(found)
    assert found.source.options.quant == "auto"
    assert heard(found).text == "One.Two."


def test_a_model_that_is_refused_at_once_costs_nothing(talk: Talk) -> None:
    found = talk("One.", "Two.")
    model = found.session.engine.model
    converse(found, Lines("First?", "/model ./gone", "/model nano int3", "/model a b c", "/model", "Second?"))
    assert remarks(found).count("error: ") == 3
    assert found.session.engine.model is model
    assert isinstance(model, ScriptedModel)
    assert heard(found).text == "One.Two."
