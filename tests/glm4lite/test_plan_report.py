"""`glm4lite plan`: what it says of folders, a lone config.json and Hub repos, and that it fetches next to nothing."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.errors import CheckpointError, ConfigError, Glm4liteError
from glm4lite.base.sizes import enough, parse_size
from glm4lite.checkpoint.codec_choice import Aim
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.loading.plan_report import PlacementReport, plan
from glm4lite.loading.proposals import Proposal
from glm4lite.loading.requirements import headers, imagined, requirements_of
from glm4lite.memory import machine
from glm4lite.memory.budget import Budget
from glm4lite.memory.resources import Machine
from glm4lite_quant import QuantConfig, host
from tests.commands import forked, python
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.hub_server import HubServer, Repo
from tests.glm4lite.test_placement import GIB, NINE, NINE_BYTES, THIRTY_TWO, THIRTY_TWO_BYTES

UNSET = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in UNSET and "proxy" not in key.lower()}


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [*forked(), "plan", *map(str, arguments)]
    done = subprocess.run(
        command, env=clean_environment() | variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def bare(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of 24 GiB without a GPU; nothing is measured."""
    known = Machine(24 * GIB)
    monkeypatch.setattr(machine, "this_machine", lambda quantized=True: known)
    return known


# --- where the needs come from


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "glm"}], ids=str)
@pytest.mark.parametrize("quant", ["int4", "int8", "none", "nf4"])
def test_a_lone_config_needs_what_its_shards_need(tmp_path: Path, changes: dict[str, Any], quant: str) -> None:
    config = tiny_config(**changes)
    shards = write_checkpoint(tmp_path / "shards", config)
    assert requirements_of(imagined(bare(tmp_path / "bare", config)), quant) == requirements_of(headers(shards), quant)


def test_a_quantized_folder_needs_what_it_stores_and_can_be_read_in_place(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    written = quantize_checkpoint(source, tmp_path / "int4", "int4")
    stored, made = requirements_of(headers(written)), requirements_of(headers(source), "int4")
    assert stored.weight_bytes == made.weight_bytes
    assert (stored.stored, made.stored) == (True, False)
    assert (stored.loading, made.loading > 0) == (0, True)
    config = json.loads((written / "config.json").read_text())
    assert requirements_of(imagined(bare(tmp_path / "bare", config))) == stored


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**15}, {"vocab_size": 2**40}])
def test_absurd_sizes_of_a_lone_config_are_refused_at_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config.json: .*: Input should be less than or equal to"):
        headers(bare(tmp_path / "bare", tiny_config(**changes)))


def test_a_folder_of_other_weights_is_refused_as_load_refuses_it(tmp_path: Path) -> None:
    folder = bare(tmp_path / "pickle", tiny_config())
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds only pickle weights"):
        headers(folder)


# --- the report


def test_the_report_of_a_32b_beside_a_gpu_that_is_not_there(tmp_path: Path, here: Machine) -> None:
    folder = bare(tmp_path / "32b", THIRTY_TWO)
    found = plan(folder, None, Budget(gpu_memory=8 * GIB, ram=16 * GIB)).to_json()
    assert found["fits"] is True
    assert found["weight_bytes"] == THIRTY_TWO_BYTES
    assert found["kv_bytes"] == sum(device["kv"] for device in found["devices"].values())
    assert list(found["devices"]) == ["cuda:0", "cpu"]
    gpu = found["devices"]["cuda:0"]
    assert gpu["layers"] == list(range(42, 61))
    assert sum(gpu[key] for key in ("weights", "kv", "activations", "reserve", "buffers")) <= 8 * GIB
    assert gpu.keys() >= {"weights", "kv", "activations", "reserve", "layers"}
    assert found["decode_tokens_per_s"] > 0
    assert found["prefill_tokens_per_s"] > 0
    assert found["assumed"] == ["a GPU of 8.0 GiB, 272 GB/s, 30 TFLOP/s, as an RTX 4060; its bus 12 GB/s"]


def test_what_must_lie_on_disk_is_planned_as_if_it_was_quantized_once(tmp_path: Path, here: Machine) -> None:
    found = plan(bare(tmp_path / "9b", NINE), None, Budget(context=1024, ram=3 * GIB, kv="float")).to_json()
    assert found["fits"] is True
    assert len(found["devices"]["disk"]["layers"]) == 28
    assert found["assumed"] == [
        "the folder that `glm4lite quantize` writes once: only stored layers can be read as they are needed",
        "a disk of 2.0 GB/s (no shard is here to measure it with)",
    ]
    assert found["advice"] == "with 5.7GiB of RAM no layer would be read from disk"


def test_the_disk_is_measured_where_layers_lie_on_it(
    tmp_path: Path, here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantize_checkpoint(write_checkpoint(tmp_path / "tiny"), tmp_path / "int4", "int4")
    asked: list[Path] = []

    def bandwidth(file: Path) -> float:
        asked.append(file)
        return 5e9

    monkeypatch.setattr(machine, "disk_bandwidth", bandwidth)
    monkeypatch.setattr(
        "glm4lite.memory.placement.RING_BUFFERS", 0
    )  # of two tiny layers, three would be more than both
    whole = plan(folder, None, Budget(context=64, kv="float")).placement
    assert asked == []
    found = plan(folder, None, Budget(context=64, ram=whole.share("cpu").held - 1, kv="float"))
    assert [file.parent for file in asked] == [folder]
    assert found.machine.disk_bandwidth == 5e9
    assert found.placement.share("disk").layers
    assert found.assumed == ()


def test_more_ram_than_is_here_is_planned_for_and_said(tmp_path: Path, here: Machine) -> None:
    found = plan(bare(tmp_path / "9b", NINE), "none", Budget(ram=32 * GIB))
    assert found.placement.fits
    assert found.assumed == ("32.0 GiB of RAM (24.0 GiB are free here now)",)


def test_more_gpu_memory_than_is_free_is_planned_for_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "this_machine", lambda quantized=True: Machine(24 * GIB, gpus=(4 * GIB,)))
    found = plan(bare(tmp_path / "9b", NINE), None, Budget(gpu_memory=8 * GIB), 1e12)
    assert found.assumed == ("8.0 GiB of GPU memory (4.0 GiB are free here now)",)
    assert len(found.placement.share("cuda:0").layers) == 40
    assert found.machine.gpu_bandwidth == 1e12


@pytest.mark.parametrize(
    ("quant", "budget", "message"),
    [
        ("int3", Budget(), "use int4, int8, nf4, fp4 or none"),
        (None, Budget(context=513), "the context is 513 tokens; this model takes 1 to 512"),
    ],
)
def test_what_cannot_be_planned_is_said(
    tmp_path: Path, here: Machine, quant: str | None, budget: Budget, message: str
) -> None:
    with pytest.raises((Glm4liteError, ValueError)) as caught:
        plan(bare(tmp_path / "tiny", tiny_config()), quant, budget)
    assert message in str(caught.value)


# --- what to change


REFUSED = [
    (None, Budget(ram=GIB)),
    (None, Budget(ram=2 * GIB, kv="float")),
    (None, Budget(gpu_memory=GIB)),
    (None, Budget(ram=GIB, gpu_memory=0)),
    ("none", Budget(ram=2 * GIB, kv="float")),
    ("none", Budget(ram=3 * GIB, context=32768)),
    ("none", Budget(ram=3 * GIB // 2, context=1024)),
    ("int8", Budget(ram=5 * GIB // 2, context=32768, kv="float")),
    ("nf4", Budget(ram=3 * GIB, context=32768)),
]


@pytest.mark.parametrize(
    ("config", "quant", "budget"),
    [
        *((NINE, *REFUSED[place]) for place in (0, 2, 5, 8)),
        (THIRTY_TWO, *REFUSED[7]),
        *(pytest.param(NINE, *REFUSED[place], marks=pytest.mark.slow) for place in (1, 3, 4, 6, 7)),
        *(pytest.param(THIRTY_TWO, *REFUSED[place], marks=pytest.mark.slow) for place in (0, 2)),
    ],
    ids=lambda value: value.get("num_hidden_layers") if isinstance(value, dict) else str(value),
)
def test_every_proposal_makes_it_fit_and_a_little_less_does_not(
    tmp_path: Path,
    here: Machine,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    quant: str | None,
    budget: Budget,
) -> None:
    folder = bare(tmp_path / "plain", config)
    found = plan(folder, quant, budget)
    assert not found.placement.fits
    assert found.proposals
    assert [text for name, text in found.lines() if name == "would fit"] == [one.said() for one in found.proposals]

    monkeypatch.setattr("glm4lite.loading.plan_report._Attempts.proposals", lambda _: ())  # one level is enough
    monkeypatch.setattr("glm4lite.loading.plan_report.headers", functools.cache(headers))  # the same few each time
    monkeypatch.setattr("glm4lite.loading.plan_report.requirements_of", functools.cache(requirements_of))

    def applied(proposal: Proposal, **less: Any) -> PlacementReport:
        changes = {"quant": quant, **asdict(budget), **proposal.changes, **less}
        asked, model = changes.pop("quant"), folder
        if proposal.quantize_first is not None:
            stored = QuantConfig(int(proposal.quantize_first.removeprefix("int"))).to_dict()
            asked, model = None, bare(tmp_path / proposal.quantize_first, config | {"quantization_config": stored})
        return plan(model, asked, Budget.of(**changes))

    for proposal in found.proposals:
        report = applied(proposal)
        assert report.placement.fits, proposal
        assert report.placement.decode_tokens_per_s == pytest.approx(proposal.decode_tokens_per_s)
        for name in proposal.changes.keys() & {"ram", "gpu_memory"}:
            size = proposal.changes[name]
            less = applied(proposal, **{name: max(parse_size(size) - GIB // 4, 0)}) if size else None
            other_way = less is not None and any("`glm4lite quantize`" in note for note in less.assumed)
            assert less is None or other_way or not less.placement.fits, proposal
        if "context" in proposal.changes:
            longer = applied(proposal, context=proposal.changes["context"] + 256)
            assert not longer.placement.fits, proposal


# --- the command


def test_the_table_names_every_device_and_what_to_change(tmp_path: Path) -> None:
    folder = bare(tmp_path / "9b", NINE)
    done = run(folder, "--gpu-memory", "4GiB", "--ram", "16GiB", "--context", "4096")
    assert done.returncode == 0, done.stderr
    assert "cuda:0" in done.stdout
    assert "head" in done.stdout
    assert "…" not in done.stdout
    assert "tokens/s" in done.stdout
    refused = run(folder, "--ram", "1GiB", "--kv", "float", "--json")
    assert refused.returncode == 0
    found = json.loads(refused.stdout)
    assert found["fits"] is False
    assert found["advice"] == "1.0 GiB of RAM do not suffice"
    assert any({"ram": "2.2GiB", "quantize_first": "int4"}.items() <= one.items() for one in found["proposals"])
    assert found["weight_bytes"] == NINE_BYTES


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ram", "8", "'8' has no unit; give a size such as 8GiB or 512MiB"),
        ("gpu_memory", "-1G", "'-1G' is not a size; give one such as 8GiB, 8GB or 512MiB"),
        ("context", "0", "the context is '0'; use a whole number of tokens of at least 1"),
        ("context", "9" * 5000, "the context is 99999999999999999999 tokens; this model takes"),
    ],
)
def test_bad_limits_are_said(name: str, value: str, message: str) -> None:
    texts: dict[str, Any] = {name: value}
    with pytest.raises(Glm4liteError) as caught:
        plan("nano", None, Budget.of(**texts))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200


def test_bad_arguments_get_one_line() -> None:
    done = run("nano", "--context", "40000")
    message = "error: the context is 40000 tokens; this model takes 1 to 4096\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


# --- from the Hub


def test_of_a_repo_only_config_and_headers_are_fetched(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "large", tiny_config(vocab_size=16000), shards=2)
    with HubServer({"org/large": Repo.of(source)}) as hub:
        done = run("org/large", "--json", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["weight_bytes"] == requirements_of(headers(source), "int4").weight_bytes
    shards = {path.name for path in source.glob("*.safetensors")}
    assert {name for name, _ in hub.ranges} == shards
    assert max(size for _, size in hub.ranges) <= 100_001 < source.joinpath(min(shards)).stat().st_size
    assert hub.fetched - shards == {"config.json", "model.safetensors.index.json"}
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_shards_called_otherwise_and_a_server_without_ranges_are_planned(tmp_path: Path) -> None:
    """Of a file that comes whole, only the beginning is read."""
    source = write_checkpoint(tmp_path / "large", tiny_config(vocab_size=16000), shards=2)
    files = Repo.of(source).files
    index = files.pop("model.safetensors.index.json").replace(b"model-", b"pytorch_model-")
    named = {name.replace("model-", "pytorch_model-"): data for name, data in files.items()}
    repo = Repo(named | {"model.safetensors.index.json": index, "consolidated.safetensors": b"other"}, ranges=False)
    with HubServer({"org/large": repo}) as hub:
        done = run("org/large", "--json", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["weight_bytes"] == requirements_of(headers(source), "int4").weight_bytes
    assert "consolidated.safetensors" not in hub.fetched


def test_a_header_longer_than_usual_is_read_whole(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", shards=1)
    data = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = data[8 : 8 + length] + b" " * 200_000
    repo = Repo.of(source)
    repo.files["model.safetensors"] = len(padded).to_bytes(8, "little") + padded + data[8 + length :]
    with HubServer({"org/padded": repo}) as hub:
        done = run("org/padded", "--json", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["weight_bytes"] == requirements_of(headers(source), "int4").weight_bytes


def test_a_token_is_not_sent_where_shards_are_stored(tmp_path: Path) -> None:
    files = Repo.of(write_checkpoint(tmp_path / "tiny")).files
    with HubServer({"org/gated": Repo(files)}) as storage:
        elsewhere = storage.url.replace("127.0.0.1", "localhost")
        with HubServer({"org/gated": Repo(files, token="hf_secret", elsewhere=elsewhere)}) as hub:
            done = run("org/gated", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_TOKEN="hf_secret")
    assert (done.returncode, done.stderr) == (0, "")
    assert [sent for _, sent in storage.authorizations] == [None, None]


def test_repos_that_cannot_be_planned_are_named_in_one_line(tmp_path: Path) -> None:
    repos = {
        "org/pickle": Repo({"config.json": b"{}", "pytorch_model.bin": bytes(100)}),
        "org/gated": Repo({}, token="hf_secret"),
        "org/broken": Repo({"config.json": b"{}", "model.safetensors": b"\x08" + bytes(7) + b"no json!"}),
        "org/down": Repo(status=503),
        "org/short": Repo({"config.json": b"{}", "model.safetensors": b"\x08"}),
        "org/vast": Repo({"config.json": b"{}", "model.safetensors": b"\xff" * 9}),
    }
    code = """if True:
        import sys
        from glm4lite.base.errors import HubError
        from glm4lite.loading.requirements import headers
        for name in sys.argv[1:]:
            try:
                headers(name)
            except HubError as error:
                print(error)
        """
    with HubServer(repos) as hub:
        variables = clean_environment() | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        command = [*python(), "-c", code, *repos, "org/none"]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=True)
    said = done.stdout.splitlines()
    assert len(said) == 7
    assert said[0].startswith("org/pickle holds only pickle weights")
    assert said[1].startswith("org/gated is gated: accept its terms")
    assert said[2].startswith("org/broken has no usable safetensors headers")
    assert said[3].startswith(f"org/down: {hub.url} answered HTTP 503")
    assert said[4].startswith("org/short has no usable safetensors headers (org/short/model.safetensors is truncated")
    assert said[5].startswith("org/vast has no usable safetensors headers (")
    assert said[6].startswith(f"org/none does not exist on {hub.url}")


def test_without_a_network_a_downloaded_repo_is_planned_and_another_is_one_line(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny")
    home = {"HF_HOME": str(tmp_path / "home")}
    with HubServer({"org/tiny": Repo.of(source)}) as hub:
        code = "from glm4lite.hub.sources import resolve; resolve('org/tiny')"
        variables = clean_environment() | home | {"HF_ENDPOINT": hub.url}
        subprocess.run([*python(), "-c", code], env=variables, check=True, timeout=120)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    assert run("org/tiny", "--json", HF_ENDPOINT=closed, **home).returncode == 0
    absent = run("org/other", HF_ENDPOINT=closed, **home)
    offline = run("org/other", HF_HUB_OFFLINE="1", **home)
    assert absent.returncode == 2
    assert absent.stderr.startswith(f"error: {closed} cannot be reached (")
    assert absent.stderr.count("\n") == 1
    assert offline.returncode == 2
    assert offline.stderr == (
        "error: org/other is not (or not wholly) in the cache and HF_HUB_OFFLINE is set; unset it to download\n"
    )


# --- sizes and speeds


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8G", 8 << 30), ("8GB", 8 * 10**9), ("512MiB", 512 << 20), ("1.5 gib", 3 << 29), ("0", 0)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8", "GiB", "8 XB", "-8GiB", "nan", "1e3GiB", "8GiBs", "x" * 1000, "٨GiB"])
def test_what_is_no_size_is_said_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"8GiB|512MiB") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("size", [1, 1 << 20, (1 << 20) + 1, (1 << 30) - 1, 1 << 30, 3_234_567_890])
def test_an_advised_size_suffices(size: int) -> None:
    assert size <= parse_size(enough(size)) <= size * 1.1 + (1 << 20)


def test_what_is_read_to_measure_memory_is_more_than_the_caches_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "PROCESSORS", tmp_path)
    assert machine.beyond_caches() == 256 << 20
    for index, size in enumerate(("48K", "2048K", "491520K", "odd")):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert machine.beyond_caches() == 2 * 480 << 20
    (tmp_path / "cpu0" / "cache" / "index3" / "size").write_text("4000000K")
    assert machine.beyond_caches() == 1 << 30


def test_speeds_are_measured() -> None:
    assert all(1e8 < machine.ram_bandwidth(quantized) < 1e13 for quantized in (True, False))
    assert 1e8 < machine.cpu_rate(True) < 1e15


def test_the_disk_is_read_past_the_cache_and_a_short_file_is_not_measured(tmp_path: Path) -> None:
    long, short = tmp_path / "long", tmp_path / "short"
    long.write_bytes(bytes(80 << 20))
    short.write_bytes(bytes(1 << 20))
    found = machine.disk_bandwidth(long)
    assert found is None or 1e6 < found < 1e12
    assert machine.disk_bandwidth(short) is None
    assert machine.disk_bandwidth(tmp_path / "absent") is None


# --- bits for each weight


def test_fewer_bits_are_proposed_with_what_they_lose_where_int4_does_not_stay_in_memory(
    tmp_path: Path, here: Machine
) -> None:
    folder = bare(tmp_path / "32b", THIRTY_TWO)
    told = plan(folder, budget=Budget(ram=16 * GIB))
    assert told.placement.fits
    assert told.placement.share("disk").layers
    nearer = told.in_memory
    assert nearer is not None
    assert re.fullmatch(r"3\.\d bits|4(\.\d)? bits", nearer.changes["quant"])
    assert nearer.expected_loss is not None
    said = {str(name): line for name, line in told.lines()}["all in memory"]
    assert re.fullmatch(
        r"the folder of `glm4lite quantize --bits [34][.0-9]*`: about [0-9.]+ tokens/s, expected loss 0\.\d+", said
    )
    bits = float(nearer.changes["quant"].removesuffix(" bits"))
    small = plan(folder, budget=Budget(ram=16 * GIB), aim=Aim(bits))
    more = plan(folder, budget=Budget(ram=16 * GIB), aim=Aim(bits + 0.1))
    assert not small.placement.share("disk").layers
    assert more.placement.share("disk").layers
    assert small.choice is not None
    assert more.choice is not None
    assert small.choice.loss > more.choice.loss > 0
    assert small.to_json()["codecs"]
    assert small.needs.weight_bytes < more.needs.weight_bytes


def test_what_fits_leaves_room_for_all_that_a_plan_counts(tmp_path: Path, here: Machine) -> None:
    folder = bare(tmp_path / "9b", NINE)
    for size, context in ((5, 8192), (8, 8192), (5, 1024)):
        budget = Budget(context=context)
        told = plan(folder, budget=budget, aim=Aim(None, size * GIB, budget))
        cpu = told.placement.share("cpu")
        assert size * GIB * 0.99 < cpu.held + cpu.mapped <= size * GIB
    with pytest.raises(ConfigError, match=r"does not fit 2\.0 GiB: the smallest that can be had takes"):
        plan(folder, aim=Aim(None, 2 * GIB))
