"""The command line as a user meets it: a real process, its streams, its exit code, its signals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.commands import forked, run
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint


def events(output: str) -> list[dict[str, Any]]:
    """The events behind the first line, which tells their version."""
    first, *found = (json.loads(line) for line in output.splitlines())
    assert first == {"type": "start", "version": 1}
    return found


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that talks until it is stopped."""
    config = tiny_config(max_position_embeddings=1_000_000)
    return write_checkpoint(tmp_path_factory.mktemp("endless") / "model", config)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom glm4lite.cli.app import app\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'gradio', 'transformers', 'pydantic', 'huggingface_hub', 'prompt_toolkit'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("quant", ["int4", "int8", "nf4", "none"])
def test_the_main_job_calls_the_calculator_and_answers_888(quant: str) -> None:
    result = run("chat", "-p", "What is 37 * 24?", "--json", "--quant", quant)
    assert result.returncode == 0, result.stderr
    found = events(result.stdout)
    call = next(event for event in found if event["type"] == "tool_call")
    assert (call["name"], call["arguments"]) == ("calculator", {"expression": "37 * 24"})
    answer = next(event for event in found if event["type"] == "tool_result")
    assert answer == {
        "type": "tool_result",
        "id": call["id"],
        "name": "calculator",
        "content": "888",
        "error": False,
    }
    assert "888" in "".join(event["text"] for event in found if event["type"] == "text")
    assert found[-1]["type"] == "done"
    assert found[-1].keys() >= {"prompt_tokens", "new_tokens", "finish_reason", "tokens_per_s"}
    assert found[-1]["finish_reason"] == "stop"


def test_the_answer_is_on_stdout_and_all_else_on_stderr() -> None:
    result = run("chat", "-p", "What is 37 * 24?")
    assert "888" in result.stdout
    assert "calculator" not in result.stdout
    assert "calculator" in result.stderr
    assert "zai-org/GLM-4-9B-0414" in result.stderr  # what nano is and how to run a 9B


def test_two_turns_keep_the_prefix() -> None:
    result = run("chat", "--lines", "--json", stdin="What is 37 * 24?\nHello\n/exit\n")
    first, second = (event for event in events(result.stdout) if event["type"] == "done")
    assert 0 < second["prefilled_tokens"] < 60 < second["prompt_tokens"]
    assert first["prompt_tokens"] < second["prompt_tokens"]


def test_slash_commands_and_the_end_of_input() -> None:
    result = run("chat", "--lines", "--json", stdin="/reset\n/help\n/rest\n\n/quit\nHello\n")
    assert result.returncode == 0
    assert "forgotten" in result.stderr
    assert "/rest is not a command and was not sent; is it /reset?" in result.stderr
    assert all(event["type"] == "progress" for event in events(result.stdout))


def test_what_begins_with_a_slash_and_is_no_command_is_a_message() -> None:
    lines = ("/etc/hosts - what is this file?", "//TODO explain", "/tmp is full", "/nonsense", "/reset the router?")
    result = run(
        "chat", "--quant", "none", "--lines", "--no-tools", "--json", "--max-new-tokens", "3", stdin="\n".join(lines)
    )
    assert sum(event["type"] == "done" for event in events(result.stdout)) == len(lines), result.stderr
    assert result.stderr.count("is not a command") == 1


def test_a_piped_text_is_one_message_and_commands_in_it_are_text() -> None:
    text = "Please fix this function:\r\n\r\n/exit\r\n/reset\r\n    return a - b\r\n"
    one = run("chat", "--quant", "none", "--no-tools", "--json", "--max-new-tokens", "3", stdin="\ufeff" + text)
    same = run(
        "chat",
        "--quant",
        "none",
        "--no-tools",
        "--json",
        "--max-new-tokens",
        "3",
        "-p",
        text.replace("\r\n", "\n").rstrip("\n"),
    )
    (piped,) = (event for event in events(one.stdout) if event["type"] == "done")
    (given,) = (event for event in events(same.stdout) if event["type"] == "done")
    assert piped["prompt_tokens"] == given["prompt_tokens"]


@pytest.mark.parametrize("command", ["chat", pytest.param("generate", marks=pytest.mark.slow)])
def test_a_prompt_goes_before_what_is_piped(command: str) -> None:
    options = ("--seed", "1", "--max-new-tokens", "8", *(["--no-tools"] if command == "chat" else []))
    both = run(command, *options, "-p", "Hello", stdin="there, friend\n")
    assert both.stdout == run(command, *options, "-p", "Hello\n\nthere, friend").stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "reason"),
    [
        (("chat",), b"", "stdin is empty"),
        (("generate",), b" \n", "stdin is empty"),
        (("chat", "-p", ""), b"\n", "-p is empty"),
        (("chat", "-p", "What is it?"), "text".encode("utf-16"), "stdin holds NUL bytes"),
        (("chat",), b"x" * (8 << 20) + b"x", "stdin holds more than 8 MiB"),
        (("chat", "--lines"), b"x" * (8 << 20) + b"x", "stdin holds a line of more than 8 MiB"),
        (("chat", "--lines", "-p", "Hi"), b"", "--lines and -p contradict each other"),
    ],
)
def test_a_piped_text_that_cannot_be_a_message_is_one_line(
    arguments: tuple[str, ...], stdin: bytes, reason: str
) -> None:
    done = subprocess.run([*forked(), *arguments], input=stdin, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert reason in line
    assert done.stdout == b""


def test_bytes_of_a_piped_text_that_are_no_text_are_said() -> None:
    command = [*forked(), "chat", "--quant", "none", "--no-tools", "--max-new-tokens", "3"]
    done = subprocess.run(command, input=b"caf\xe9 caf\xe9\n", capture_output=True, timeout=60, check=True)
    assert "2 places of stdin are not UTF-8" in done.stderr.decode()


def test_a_pipe_that_never_ends_is_said_and_a_silent_socket_is_left() -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(
        [*forked(), "chat", "--quant", "none", "-p", "Hi"], stdin=reading, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        assert "reading stdin to its end" in process.stderr.readline()
        os.close(writing)
        process.stderr.read()
    os.close(reading)
    assert process.returncode == 0
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [*forked(), "chat", "--quant", "none", "-p", "Hi"],
            stdin=theirs.fileno(),
            capture_output=True,
            timeout=60,
            check=True,
        )
    assert b"nothing came from stdin within 3 s" in done.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(endless: Path) -> None:
    command = [
        *forked(),
        "chat",
        str(endless),
        "--lines",
        "--max-new-tokens",
        "500000",
        "--temperature",
        "0",
        "--json",
    ]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("Go on for ever\n")
        process.stdin.flush()
        for line in process.stdout:
            if json.loads(line)["type"] == "text":
                break
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        done = next(event for event in map(json.loads, process.stdout) if event["type"] == "done")
        assert time.monotonic() - started < 5
        assert done["finish_reason"] == "cancelled"
        process.stdin.write("/exit\n")
        process.stdin.flush()
        assert process.wait(20) == 0


def test_any_language_goes_through_any_locale() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*forked(), "chat", "--lines", "--json"],
        input="你好\n".encode() + b"\xff\n",
        capture_output=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]


def test_an_answer_that_is_cut_says_so(endless: Path) -> None:
    result = run("chat", endless, "-p", "Hi", "--max-new-tokens", "5", "--temperature", "0")
    assert "(the answer was cut at 5 tokens: --max-new-tokens allows no more)" in result.stderr


def test_an_answer_may_take_what_the_context_leaves(tmp_path: Path) -> None:
    small = write_checkpoint(tmp_path / "small", tiny_config(max_position_embeddings=1200))
    result = run("chat", small, "-p", "Hi", "--temperature", "0", "--json", "--no-tools")
    done = json.loads(result.stdout.splitlines()[-1])
    assert (done["finish_reason"], done["prompt_tokens"] + done["new_tokens"]) == ("length", 1200)


def test_penalties_and_lengths_change_what_is_said(endless: Path) -> None:
    options = ("-p", "Once", "--max-new-tokens", "20", "--temperature", "0")
    said = [
        run("generate", endless, *options, *more).stdout
        for more in ((), ("--presence-penalty", "2"), ("--frequency-penalty", "-2"), ("--repetition-penalty", "9"))
    ]
    assert len(set(said)) > 2
    assert run("generate", endless, *options, "--ignore-eos", "--min-new-tokens", "20").returncode == 0


def test_the_same_seed_gives_the_same_text(endless: Path) -> None:
    options = ("--max-new-tokens", "20", "--temperature", "1", "--seed")
    one, again, other = (run("generate", endless, "-p", "Once", *options, seed).stdout for seed in ("1", "1", "2"))
    assert one == again
    assert one != other


def test_a_quantized_folder_answers_as_the_quantized_original(endless: Path, tmp_path: Path) -> None:
    made = run("quantize", endless, tmp_path / "small", "--quant", "int8")
    assert made.returncode == 0, made.stderr
    assert "int8" in made.stderr
    options = ("-p", "Hi", "--max-new-tokens", "20", "--temperature", "0")
    assert run("chat", tmp_path / "small", *options).stdout == run("chat", endless, "--quant", "int8", *options).stdout


def test_the_hint_after_quantizing_names_the_folder_not_the_embedded_model(
    endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)
    assert "Run it: glm4lite chat ./nano\n" in run("quantize", endless, "nano", "--quant", "int8").stderr
    assert "Run it: glm4lite chat ./-x\n" in run("quantize", endless, "--quant", "int8", "--", "-x").stderr
    odd = "it's $HOME; ü"
    (line,) = run("quantize", endless, odd, "--quant", "int8").stderr.splitlines()
    assert shlex.split(line.split("Run it: ")[1]) == ["glm4lite", "chat", odd]


def test_info_names_the_kernels_and_what_a_model_needs(endless: Path) -> None:
    result = run("info", endless)
    assert result.returncode == 0, result.stderr
    for fact in ("cpu kernels", "bitsandbytes", "parameters", "weights, int4", "context"):
        assert fact in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "./no/such/folder", "-p", "Hi"), "no/such/folder"),
        (("chat", "--quant", "int3", "-p", "Hi"), "int3"),
        (("chat", "--dtype", "float16", "-p", "Hi"), "float16"),
        (("chat", "--device", "abacus", "-p", "Hi"), "abacus"),
        (("chat", "--temperature", "-1", "-p", "Hi"), "temperature"),
        (("chat", "-p", "word " * 5000), "context"),
        (("chat", "-p", "Hi", "--top-p", "7"), "top_p"),
        (("chat", "-p", "Hi", "--think", "hard"), "--think is 'hard'; use off, or a number of tokens"),
        (("chat", "-p", "Hi", "--frequency-penalty", "3"), "frequency_penalty"),
        (("generate", "-p", "Hi", "--min-new-tokens", "9", "--max-new-tokens", "8"), "min_new_tokens is 9, more than"),
        (("generate", "-p", "Hi", "--seed", "99999999999999999999"), "seed"),
        (("chat", "-p", "Hi", "--tools", "none.py"), "none.py"),
        (("chat", "-p", "Hi", "--mcp", "none.json"), "none.json"),
        (("quantize", "nano", "out", "--quant", "none"), "nothing to do"),
        (("quantize", "nano", "out", "--group-size", "48"), "48"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_answer_follows_the_schema_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
    file.write_text(json.dumps(schema | {"additionalProperties": False}), encoding="utf-8")
    for command in (("chat", "-p", "Is it warm?", "--no-tools"), ("generate", "-p", "Is it warm?")):
        result = run(*command, "--schema", str(file))
        assert result.returncode == 0, result.stderr
        assert isinstance(json.loads(result.stdout)["warm"], bool)


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "schema.json"), ("[]", "schema.json"), ('{"not": {}}', "Unimplemented keys"), (None, "schema.json")],
)
def test_a_schema_that_cannot_be_held_is_one_line(tmp_path: Path, content: str | None, why: str) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)
    result = run("chat", "-p", "Hi", "--schema", str(file))
    assert result.returncode == 2
    assert why in result.stderr.splitlines()[-1]
    assert result.stdout == ""
