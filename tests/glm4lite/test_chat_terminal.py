"""`glm4lite chat` at a terminal as a user meets it: a real pseudo-terminal, real keys, what stands on the screen."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.name != "posix":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

from tests.commands import forked
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.screen import CTRL_C, CTRL_D, ENTER, TAB, UP, Screen, pasted

QUESTION = "What is 37 * 24?"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def chat(home: Path) -> Iterator[Screen]:
    with Screen(home) as screen:
        screen.wait_for_prompt()
        yield screen


def history(home: Path) -> str:
    file = home / "glm4lite" / "history"
    return file.read_text() if file.exists() else ""


def questions(chat: Screen, home: Path, name: str) -> list[str]:
    """What the model was asked, as `/save` wrote it."""
    chat.type(f"/save {name}{ENTER}")
    chat.wait_for(f"(saved: {name})")
    kept = [json.loads(file.read_text()) for file in (home / "glm4lite" / "chats").glob("*.json")]
    (saved,) = (one for one in kept if one["title"] == name)
    return [message["content"] for message in saved["messages"] if message["role"] == "user"]


def complete(chat: Screen, typed: str, becomes: str) -> None:
    """Types, waits for the menu below the line, takes its first entry."""
    chat.type(typed)
    chat.wait_for(becomes.rpartition(" ")[2].lstrip('@"'))
    chat.type(TAB)
    chat.wait_for(becomes)


def test_a_pasted_text_of_several_lines_is_one_question(chat: Screen, home: Path) -> None:
    (home / "notes.txt").write_text("secret")
    text = "    @dataclass\n    class A:\n        b: int \\\n@notes.txt\n@no.such.file"
    chat.type(pasted(text + "\n"))
    chat.wait_for("@no.such.file")
    chat.type(ENTER)
    chat.wait_for("tok/s")
    chat.wait_for_prompt()
    chat.type(UP)
    chat.wait_for("@no.such.file", 2)
    chat.type(ENTER)
    chat.wait_for("tok/s", 2)
    chat.wait_for_prompt()
    assert questions(chat, home, "one") == [text, text]


def test_blocks_and_backslashes_make_several_lines(chat: Screen, home: Path) -> None:
    chat.type(f'"""first{ENTER}/exit{ENTER}third"""{ENTER}')
    chat.wait_for("tok/s")
    chat.wait_for_prompt()
    chat.type(f"one \\{ENTER}two{ENTER}")
    chat.wait_for("tok/s", 2)
    chat.wait_for_prompt()
    assert questions(chat, home, "two") == ["first\n/exit\nthird", "one \ntwo"]


def test_a_terminal_that_cannot_move_its_cursor_has_the_same_rules(home: Path) -> None:
    with Screen(home, TERM="dumb") as chat:
        chat.wait_for("\n>")
        chat.type('"""first\nsecond"""\n')
        chat.wait_for("tok/s")
        chat.type("one \\\ntwo\n")
        chat.wait_for("tok/s", 2)
        assert questions(chat, home, "dumb") == ["first\nsecond", "one \ntwo"]
        assert b"\x1b" not in chat.raw


def test_commands_and_their_arguments_are_completed(chat: Screen, home: Path) -> None:
    (home / "my notes.txt").write_text("The word is heron.")
    complete(chat, "/set temp", "> /set temperature")
    chat.type(f" 0.25{ENTER}")
    chat.wait_for("(temperature: 0.25)")
    chat.wait_for_prompt()
    complete(chat, "/sho", "> /show")
    chat.type(ENTER)
    shown = chat.wait_for("markdown            on")
    for line in ("model               nano, 5 layers", "temperature         0.25", "tools               on"):
        assert line in shown
    chat.wait_for_prompt()
    complete(chat, "Say @my", '> Say @"my notes.txt"')
    chat.type(f" now{ENTER}")
    chat.wait_for("tok/s")
    chat.wait_for_prompt()
    assert questions(chat, home, "file") == ["Say my notes.txt now\n\nFile my notes.txt:\n```\nThe word is heron.\n```"]


def test_a_conversation_is_saved_loaded_and_goes_on_with_another_model(chat: Screen, home: Path) -> None:
    chat.type(QUESTION + ENTER)
    chat.wait_for("37 * 24 = 888.")
    chat.wait_for_prompt()
    chat.type(f"/save sums{ENTER}")
    chat.wait_for("(saved: sums)")
    (file,) = (home / "glm4lite" / "chats").glob("*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    chat.type(f"/reset{ENTER}/show{ENTER}")
    chat.wait_for("0 of 4096 tokens, 0 questions")
    chat.wait_for_prompt()
    chat.type(f"/load sums{ENTER}")
    chat.wait_for("(loaded: 1 question, ")
    chat.wait_for_prompt()
    chat.type(f"/model nano int8{ENTER}")
    chat.wait_for("(nano: 5 layers, context 4096 tokens)")
    chat.wait_for_prompt()
    chat.type(f"/model ./nowhere{ENTER}")
    chat.wait_for("error: ./nowhere does not exist")
    chat.wait_for_prompt()
    chat.type(f"What is 12 * 12?{ENTER}")
    chat.wait_for("144")
    chat.wait_for_prompt()
    assert questions(chat, home, "sums2")[:2] == [QUESTION, "What is 12 * 12?"]
    chat.type(f"/bye{ENTER}")
    assert chat.ended() == 0


def test_what_cannot_be_done_is_one_line_and_the_conversation_goes_on(chat: Screen) -> None:
    for line, said in [
        ("/set temprature 1", "there is no setting 'temprature'; is it temperature?"),
        ("/set temperature hot", "temperature is 'hot'; give a number, or default"),
        ("/set top_p 7", "top_p must be a number between 0 and 1"),
        ("/set think on", "this model does not think"),
        ("/save", "usage: /save NAME"),
        ("/save ..", "is no name for a conversation"),
        ("/load nothing", "'nothing' is not saved"),
        ("/rset", "/rset is not a command and was not sent; is it /reset?"),
        ("look at @gone.txt", "gone.txt cannot be read: No such file or directory (@@ writes an @"),
    ]:
        chat.type(line + ENTER)
        chat.wait_for(said)
        chat.wait_for_prompt()
    assert "Traceback" not in chat.text()
    chat.type(CTRL_D)
    assert chat.ended() == 0


def test_what_was_typed_is_kept_for_this_user_alone(home: Path) -> None:
    with Screen(home, "--approve", "every") as chat:
        chat.wait_for_prompt()
        chat.type(QUESTION + ENTER)
        chat.wait_for("run calculator? [y]es")
        chat.type("y\n")
        chat.wait_for("tok/s")
        chat.wait_for_prompt()
        chat.type(f" my password is heron{ENTER}")
        chat.wait_for("tok/s", 2)
        chat.wait_for_prompt()
        chat.type(f"/exit{ENTER}")
        assert chat.ended() == 0
    file = home / "glm4lite" / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [line for line in history(home).splitlines() if line.startswith("+")] == [f"+{QUESTION}", "+/exit"]
    with Screen(home) as chat:
        chat.wait_for_prompt()
        chat.type(UP + UP)
        chat.wait_for(f"> {QUESTION}")


def test_nothing_is_kept_where_that_is_asked_for(home: Path) -> None:
    with Screen(home, "--no-history") as chat:
        chat.wait_for_prompt()
        chat.type(f"/help{ENTER}/exit{ENTER}")
        assert chat.ended() == 0
        assert "/set NAME VALUE" in chat.text()
    assert not (home / "glm4lite").exists()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that talks until it is stopped."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    return write_checkpoint(folder, tiny_config(max_position_embeddings=1_000_000))


def test_keys_while_an_answer_is_drawn_wait_for_the_next_prompt(home: Path, endless: Path) -> None:
    with Screen(home, str(endless), "--max-new-tokens", "2000", "--no-tools") as chat:
        chat.wait_for_prompt()
        chat.type(f"Go on{ENTER}")
        while chat.echoes() or chat.screen.cursor.y < 4:
            chat.read()
        chat.type("later")
        chat.wait_for("the answer was cut")
        assert chat.wait_for("> later").count("later") == 1


def test_an_answer_that_was_cut_goes_on(home: Path, endless: Path) -> None:
    with Screen(home, str(endless), "--max-new-tokens", "3", "--no-tools", "--temperature", "0") as chat:
        chat.wait_for_prompt()
        chat.type(f"Go on{ENTER}")
        chat.wait_for("(the answer was cut at 3 tokens; /continue goes on)")
        chat.wait_for_prompt()
        chat.type(f"/continue{ENTER}")
        chat.wait_for("(the answer was cut at 3 tokens; /continue goes on)", 2)


@pytest.mark.parametrize("busy", [False, True], ids=["at the prompt", "while it answers"])
def test_the_terminal_is_left_in_order_whatever_ends_it(busy: bool, home: Path, endless: Path) -> None:
    with Screen(home, str(endless), "--max-new-tokens", "500000") as chat:
        assert chat.echoes()
        chat.wait_for_prompt()
        assert not chat.echoes()
        if busy:
            chat.type(f"Go on{ENTER}")
            chat.wait_for("Go on")
            time.sleep(0.5)
        chat.process.send_signal(signal.SIGTERM)
        assert chat.ended() == 128 + signal.SIGTERM
        assert chat.echoes()


def test_ctrl_c_at_the_prompt_gives_up_the_line_only(chat: Screen) -> None:
    chat.type("never mind" + CTRL_C)
    chat.wait_for("/help lists the commands", 2)
    chat.wait_for_prompt()
    chat.type(f"/exit{ENTER}")
    assert chat.ended() == 0


@pytest.mark.parametrize(("options", "shown"), [((), "bold word"), (("--raw",), "**bold** word")])
def test_markdown_is_drawn_unless_raw(options: tuple[str, ...], shown: str, home: Path) -> None:
    code = (
        "from glm4lite.cli.output import rendering\nfrom glm4lite.cli.streams import settle_streams\n"
        "from glm4lite.base.events import TextDelta\nimport sys\nsettle_streams()\n"
        "with rendering(False, '--raw' in sys.argv) as renderer:\n"
        "    renderer.show_all(map(TextDelta, ['A **bo', 'ld** word']))\n"
    )
    with Screen(home, *options, command=(sys.executable, "-c", code)) as screen:
        assert screen.wait_for("word").strip().endswith(shown)


def test_a_question_and_its_files_come_from_options_and_stdin(home: Path) -> None:
    (home / "notes.txt").write_bytes("你好，请看下面这些数据。".encode("gbk"))
    command = [*forked(), "chat", "--no-tools", "--json", "--quant", "none"]
    command += ["--max-new-tokens", "3"]

    def tokens(prompt: str, stdin: str = "") -> int:
        done = subprocess.run(
            [*command, "-p", prompt], input=stdin, capture_output=True, text=True, cwd=home, timeout=100, check=True
        )
        return int(json.loads(done.stdout.splitlines()[-1])["prompt_tokens"])

    whole = tokens("Read @notes.txt")
    assert tokens("-", "Read notes.txt\n\nFile notes.txt:\n```\n你好，请看下面这些数据。\n```\n") == whole
    assert tokens("-", "Read @notes.txt") < whole - 10
