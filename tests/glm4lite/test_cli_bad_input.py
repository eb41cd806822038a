"""Damaged folders through the real command: exit code 2 and one clear line, no traceback; and a Hub repo that works.

Most cases call the command's `main` in this process, because starting Python and torch takes seconds; a few, and the
download, run the whole command.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.cli.app import main
from glm4lite_quant.kernels import native
from tests.commands import forked
from tests.glm4lite.checkpoints import tiny_config, tiny_tensors, write_checkpoint
from tests.glm4lite.hub_server import HubServer, Repo

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Damage = Callable[[Path], object]
Capture = pytest.CaptureFixture[str]


def config(**changes: Any) -> Damage:
    return lambda folder: (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """The same checkpoint with other tensors, in one file."""

    def damage(folder: Path) -> None:
        changed = tiny_tensors(tiny_config())
        change(changed)
        for file in folder.glob("model*"):
            file.unlink()
        save_file(changed, folder / "model.safetensors")

    return damage


def added(name: str) -> Damage:
    return tensors(lambda found: found.update({name: torch.zeros(4)}))


def text(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


def replaced(file: str, old: bytes, new: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes().replace(old, new, 1))


def removed(*files: str) -> Damage:
    def damage(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return damage


def only_pickle(folder: Path) -> None:
    removed(FIRST, SECOND, "model.safetensors.index.json")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def truncated(folder: Path) -> None:
    os.truncate(folder / FIRST, (folder / FIRST).stat().st_size - 100)


def long_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["other"] = "x" * 300 + ".safetensors"
    index.write_text(json.dumps(values))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated shard": (truncated, f"{FIRST} is truncated"),
    "corrupt shard": (replaced(FIRST, b'{"', b'\xff"'), f"{FIRST} has a corrupt header"),
    "lying header": (replaced(FIRST, b"[400,64]", b"[401,64]"), f"{FIRST} has a wrong header"),
    "missing shard": (removed(SECOND), f"lacks {SECOND}"),
    "shard with an impossible name": (long_index, "lacks xxx"),
    "missing tensor": (tensors(lambda found: found.pop("model.norm.weight")), "lacks model.norm.weight"),
    "unexpected tensor": (added("model.extra.weight"), "holds model.extra.weight"),
    "wrong shape": (
        tensors(lambda found: found.update({"model.norm.weight": torch.ones(63)})),
        "model.norm.weight in ",
    ),
    "a name that writes to the terminal": (added("a\x1b]0;title\x07\nerror: b\r"), "is no name of a tensor"),
    "a name of the other direction": (added("a\u202eb"), "is no name of a tensor"),
    "pickle only": (only_pickle, "holds only pickle weights"),
    "unknown model_type": (config(model_type="llama"), "model_type 'llama' is not supported"),
    "escapes in a value": (config(model_type="\x1b[2J\n"), "is not supported"),
    "escapes in a key": (config(**{"\x1b[2J\nerror: x": float("nan")}), "must be a finite number"),
    "wrong type": (config(hidden_size="64"), "hidden_size: "),
    "missing key": (config(hidden_size=None), "the key 'hidden_size' is missing"),
    "NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps must be a finite number"),
    "rope of 10**400": (config(rope_theta=10**400), "rope_theta must be at most"),
    "absurd size": (config(num_hidden_layers=10**9), "num_hidden_layers: Input should be less than"),
    "another tool's quantization": (config(quantization_config={"quant_method": "quip"}), "quant_method is 'quip'"),
    "config.json is no JSON": (text("config.json", "{"), "config.json is not valid JSON"),
    "config.json is missing": (removed("config.json"), "config.json is missing"),
    "generation_config.json is no JSON": (text("generation_config.json", "x"), "generation_config.json is not valid"),
    "generation_config.json with a wrong type": (
        text("generation_config.json", '{"top_k": 2.5}'),
        "generation_config.json: top_k must be a whole number",
    ),
    "generation_config.json with a wrong stop id": (
        text("generation_config.json", '{"eos_token_id": ["x"]}'),
        "generation_config.json: eos_token_id must be whole numbers",
    ),
    "tokenizer of a larger model": (config(vocab_size=300), "more than the vocab_size 300"),
    "corrupt tokenizer.json": (text("tokenizer.json", '{"model": 3}'), "tokenizer.json: cannot be read"),
    "missing tokenizer.json": (removed("tokenizer.json"), "tokenizer.json: not found"),
    "corrupt tokenizer_config.json": (text("tokenizer_config.json", "["), "tokenizer_config.json is not valid JSON"),
    "template that raises": (
        text("chat_template.jinja", "{{ raise_exception('no\x1b[2J\nerror: two') }}"),
        "chat_template.jinja",
    ),
    "template that loops": (
        text("chat_template.jinja", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "chat_template.jinja",
    ),
    "template that is no Jinja": (text("chat_template.jinja", "{% if %}"), "chat_template.jinja"),
    "no template": (removed("chat_template.jinja"), "no chat template"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", tiny_config(max_position_embeddings=4096))


def check(code: object, stderr: str, message: str) -> None:
    """Exit code 2 and one line."""
    assert code == 2, stderr
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.split("\n") if line.startswith("error: ")]
    assert stderr.endswith(f"{line}\n")
    assert message in line
    assert len(line) < 1000
    assert line.isprintable(), ascii(line)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> object:
    """The command's exit code, run in this process."""
    monkeypatch.setattr(sys, "argv", ["glm4lite", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


LOOPS = "template that loops"  # takes its five seconds; test_template.py has hostile templates


@pytest.mark.parametrize(
    "case", [*(case for case in DAMAGES if case != LOOPS), pytest.param(LOOPS, marks=pytest.mark.slow)]
)
def test_a_damaged_folder_gives_one_line_and_exit_code_2(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGES[case]
    damage(folder)
    check(command(monkeypatch, "chat", folder, "-p", "Hi"), capsys.readouterr().err, message)


def test_an_undamaged_folder_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, "chat", folder, "-p", "Hi", "--max-new-tokens", "2") == 0


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_another_quant_than_the_stored_one_is_one_line(
    quant: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = quantize_checkpoint(folder, tmp_path / "q", "int4")
    code = command(monkeypatch, "chat", written, "-p", "Hi", "--quant", quant)
    check(code, capsys.readouterr().err, "is quantized to int4 in groups of 32 already")


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/model", "./missing\x1b[2J", "missing\nerror: two"])
def test_a_name_that_is_no_model_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (("chat", name, "-p", "Hi"), ("info", name)):
        check(command(monkeypatch, *verb), capsys.readouterr().err, "; give a folder, a Hub repo id")


def environment(**changes: str) -> dict[str, str]:
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")
    inherited = {key: value for key, value in os.environ.items() if key not in names and "proxy" not in key.lower()}
    return inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | changes


def process(arguments: tuple[str | Path, ...], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*forked(), *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "case", ["truncated shard", "a name that writes to the terminal", "template that raises", "escapes in a key"]
)
def test_the_whole_command_gives_one_line_too(case: str, folder: Path) -> None:
    damage, message = DAMAGES[case]
    damage(folder)
    done = process(("chat", folder, "-p", "Hi"))
    check(done.returncode, done.stderr, message)
    assert done.stdout == ""


def test_a_repo_of_the_hub_is_downloaded_and_answers(folder: Path, tmp_path: Path) -> None:
    repos = {"org/tiny": Repo.of(folder), "org/gone": Repo(status=503)}
    with HubServer(repos) as hub:
        found = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        options = ("-p", "Hi", "--max-new-tokens", "5", "--temperature", "0", "--json")
        done = process(("chat", "org/tiny", *options), **found)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        stages = [event["stage"] for event in events if event["type"] == "progress"]
        assert stages[0] == "download"
        assert "load" in stages
        assert events[-1]["type"] == "done"
        assert events[-1]["new_tokens"] == 5
        gone = process(("chat", "org/gone", *options), **found)
        check(gone.returncode, gone.stderr, "answered HTTP 503; try again later")


RUNS: dict[str, list[str]] = {
    "chat": ["chat", "nano", "-p", "Hi"],
    "generate": ["generate", "nano", "-p", "Hi"],
    "bench": ["bench", "nano"],
    "eval": ["eval", "nano", "--text", __file__],
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", ["0", "-1", "two", "", "1000000", "9" * 5000])
def test_threads_that_the_machine_has_not_are_one_line(
    name: str, count: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(command(monkeypatch, *RUNS[name], f"--threads={count}"), capsys.readouterr().err, "threads")


@pytest.mark.parametrize("name", [*RUNS, "quantize"])
def test_an_unknown_isa_is_one_line_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLM4LITE_ISA", "sse9")
    run = RUNS.get(name, ["quantize", "nano", str(tmp_path / "q")])
    check(command(monkeypatch, *run), capsys.readouterr().err, "error: GLM4LITE_ISA is 'sse9'; use one of scalar")


def test_an_isa_the_host_lacks_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    library = native._library()
    if library.cdll is None:
        pytest.skip("no native library")
    small = native.Library(library.path, library.cdll, ("scalar",))
    monkeypatch.setattr(native, "_library", lambda: small)
    monkeypatch.setenv("GLM4LITE_ISA", "avx2")
    message = "GLM4LITE_ISA=avx2 cannot be used: this host has scalar"
    check(command(monkeypatch, *RUNS["bench"]), capsys.readouterr().err, message)


def quantized_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def shortened(plane: str) -> Damage:
    """The same file with one part of one weight cut short: its header is true."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        stored = load_file(file)
        name = f"model.layers.0.mlp.gate_up_proj.{plane}"
        cut = stored[name][:-1] if stored[name].dim() == 1 else stored[name][:, :-1]
        save_file(stored | {name: cut.contiguous()}, file)

    return damage


QUANTIZED_DAMAGES: dict[str, tuple[Damage, str]] = {
    "another format": (quantized_config(format=99), "quantization_config.format is 99; this version reads"),
    "no such group size": (quantized_config(group_size=48), "group_size is 48; use one of 32, 64, 128"),
    "another group size": (quantized_config(group_size=64), "groups of 32, but config.json says int8, groups of 64"),
    "other bits": (quantized_config(bits=8), "but config.json says int8"),
    "short scales": (shortened("scales"), "model.layers.0.mlp.gate_up_proj.weight in "),
    "short mins": (shortened("mins"), "mins has shape"),
    "short codes": (shortened("qweight"), "model.layers.0.mlp.gate_up_proj.weight in "),
    "short row scales": (shortened("row_scale"), "model.layers.0.mlp.gate_up_proj.weight in "),
    "truncated file": (lambda folder: os.truncate(folder / "model.safetensors", 50_000), "is truncated"),
}


@pytest.mark.parametrize("case", QUANTIZED_DAMAGES)
@pytest.mark.parametrize("name", ["chat", "bench"])
def test_a_damaged_quantized_folder_gives_one_line(
    case: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    damage, message = QUANTIZED_DAMAGES[case]
    written = quantize_checkpoint(folder, tmp_path / "q", "int4")
    damage(written)
    run = [str(written) if word == "nano" else word for word in RUNS[name]]
    check(command(monkeypatch, *run), capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a text"),
        (b" \n\t\n", "is empty; give a text"),
        (b"Hello", "tokens; at least 32 are needed"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (None, "cannot be read (No such file"),
    ],
)
def test_a_text_that_cannot_be_evaluated_is_one_line(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = tmp_path / "text\x1b.txt"
    if content is not None:
        file.write_bytes(content)
    check(command(monkeypatch, "eval", "nano", "--text", file), capsys.readouterr().err, message)
