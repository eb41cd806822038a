"""Models pulled from real servers on loopback: by name, from ModelScope, by address, and quantized as they arrive."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save

from glm4lite import Glm4Config, Tokenizer, load
from glm4lite.base.errors import CheckpointError, Glm4liteError, HubError
from glm4lite.base.events import Progress
from glm4lite.checkpoint.codec_choice import Aim
from glm4lite.checkpoint.formats.registry import open_source
from glm4lite.checkpoint.quantize import quantize_checkpoint
from glm4lite.checkpoint.resumable import unfinished
from glm4lite.hub.known import KNOWN
from glm4lite.hub.local import local_models, remove, runnable_models
from glm4lite.hub.options import HubOptions
from glm4lite.hub.patience import Patience
from glm4lite.hub.sources import locate, resolve
from tests.commands import python
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint, write_shards
from tests.glm4lite.file_server import FileServer
from tests.glm4lite.gguf_files import write_gguf
from tests.glm4lite.hub_server import HubServer, Repo
from tests.glm4lite.packed import write_packed
from tests.glm4lite.test_hub import variables
from tests.glm4lite.test_imports import AGAIN, LAYOUTS

LAYERS = 6
IDS = torch.tensor([[5, 9, 133, 7, 81, 300]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, of which one lies in two shards."""
    config = tiny_config(num_hidden_layers=LAYERS)
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", config)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without anything: caches and made models lie in it."""
    for name in [name for name in os.environ if name.startswith("HF_") or "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setenv("GLM4LITE_MODELS", str(tmp_path / "made"))
    return tmp_path / "home"


@pytest.fixture
def hub(tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({"org/tiny": Repo.of(tiny)}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- quantized as it arrives


def used(folder: Path, pattern: str) -> int:
    """Bytes of disk that some files of a folder take, of which some get another name meanwhile."""
    total = 0
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            about = path.stat()
            total += min(about.st_size, about.st_blocks * 512)
    return total


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What quantizing the same files from this machine gives."""
    return content(quantize_checkpoint(tiny, tmp_path_factory.mktemp("made") / "int4"))


def test_a_model_quantized_as_it_arrives_is_the_one_quantized_from_a_folder(
    hub: HubServer, tiny: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    most, work = 0, unfinished(tmp_path / "out") / "work"

    def look(event: Progress) -> None:
        nonlocal most
        most = max(most, used(work, "*.safetensors*"))

    out = quantize_checkpoint("org/tiny", tmp_path / "out", progress=look)
    assert content(out) == expected
    assert not unfinished(out).exists()
    shards = sorted(path.stat().st_size for path in tiny.glob("*.safetensors"))
    assert shards[-1] // 2 < most <= shards[-1] + shards[-1] // 2
    assert not list(tmp_path.rglob("home/**/*.safetensors"))
    asked = [path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "safetensors" in path]
    names = sorted(path.name for path in tiny.glob("*.safetensors"))
    assert sorted(asked) == sorted([*names, *names, "model.safetensors.index.json"])  # headers, then each once


def test_the_next_shard_comes_while_one_is_quantized_within_the_promised_disk(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "tiny", tiny_config(num_hidden_layers=LAYERS), shards=8)
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    work, most, ahead = unfinished(tmp_path / "out") / "work", 0, 0

    def look(event: Progress) -> None:
        nonlocal most, ahead
        most = max(most, used(work, "*.safetensors*") + used(work.parent, "*.safetensors"))
        ahead += event.stage == "quantize" and len(list(work.glob("*.safetensors*"))) > 1

    with HubServer({"org/tiny": Repo.of(source)}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        out = quantize_checkpoint("org/tiny", tmp_path / "out", progress=look)
    assert content(out) == content(quantize_checkpoint(source, tmp_path / "local"))
    assert ahead > 10
    assert largest < most <= used(out, "*.safetensors") + largest * 1.25  # what a layer needs of the last one, too


@pytest.mark.parametrize("layout", ["gptq, not symmetric", "compressed-tensors, int8"])
def test_another_tools_weights_whose_parts_lie_in_several_shards_are_quantized_as_they_arrive(
    layout: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = write_packed(tmp_path, (LAYOUTS | AGAIN)[layout], split=True)
    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    by_part = sorted(tensors, key=lambda name: name.rpartition(".")[2])  # all scales behind all codes
    write_shards(folder, {name: tensors[name] for name in by_part}, 5)
    with HubServer({"org/tiny": Repo.of(folder)}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        out = quantize_checkpoint("org/tiny", tmp_path / "out")
    assert content(out) == content(quantize_checkpoint(folder, tmp_path / "local"))


PULL = """
import os, sys
from pathlib import Path
from glm4lite.checkpoint import quantize
from glm4lite.checkpoint.quantize import quantize_checkpoint
if sys.argv[2]:
    write, count = quantize._write_fill, [int(sys.argv[2])]
    def killed(*arguments):
        write(*arguments)
        count[0] -= 1
        if not count[0]:
            os.kill(os.getpid(), 9)
    quantize._write_fill = killed
quantize_checkpoint("org/tiny", sys.argv[1])
"""


@pytest.mark.parametrize("fills", [pytest.param(1, marks=pytest.mark.slow), 30])
def test_a_killed_pull_goes_on_behind_the_last_whole_layer(
    fills: int, hub: HubServer, expected: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    command = [*python(), "-c", PULL, str(out), str(fills)]
    killed = subprocess.run(command, env=variables(hub.url, tmp_path / "home"), capture_output=True, check=False)
    assert killed.returncode != 0
    assert not out.exists()
    state = unfinished(out) / "work" / "state.json"
    units = json.loads(state.read_bytes())["units"] if state.exists() else 0
    before, seen = len(hub.ranges), list[Progress]()
    hub.requests.clear()
    assert content(quantize_checkpoint("org/tiny", out, progress=seen.append)) == expected
    assert before
    if units:
        assert f"going on behind part {units}" in caplog.text
        quantized = [event for event in seen if event.stage == "quantize"]
        assert quantized[0].done > 0
    whole = [path for method, path in hub.requests if path.endswith("1-of-00002.safetensors")]
    assert len(whole) == 1  # its header: the shard itself lay there, or was done with


def test_a_pull_that_is_stopped_keeps_what_it_did_and_another_model_begins_anew(
    hub: HubServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "made" / "out"

    def stop(event: Progress) -> None:
        if event.stage == "quantize" and event.done > event.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint("org/tiny", out, "int8", progress=stop)
    assert {one.name: one.state for one in local_models()} == {"org/tiny": "unfinished", "out": "unfinished"}
    assert content(quantize_checkpoint("org/tiny", out)) == expected


def test_shards_that_a_power_cut_may_have_damaged_are_not_used(
    hub: HubServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out, work = tmp_path / "out", unfinished(tmp_path / "out") / "work"

    def stop(event: Progress) -> None:
        if event.stage == "quantize" and event.done > event.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint("org/tiny", out, progress=stop)
    shards = list(work.glob("*.safetensors"))
    assert shards
    for shard in shards:
        shard.write_bytes(bytes(shard.stat().st_size))
    (work / "boot").write_text("1.0")
    assert content(quantize_checkpoint("org/tiny", out)) == expected


def test_a_folder_that_another_process_writes_is_refused(hub: HubServer, tmp_path: Path) -> None:
    def second(event: Progress) -> None:
        if event.stage == "quantize":
            quantize_checkpoint("org/tiny", tmp_path / "out")

    with pytest.raises(CheckpointError, match="is being written by another process; wait until it is done"):
        quantize_checkpoint("org/tiny", tmp_path / "out", progress=second)


def test_a_shard_that_is_not_what_its_header_said_is_refused(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    right = hub.repos["org/tiny"].files[name]
    other = right.replace(b'"BF16"', b'"F16" ')
    assert other != right
    hub.repos["org/tiny"].files[name] = other

    def change(event: Progress) -> None:  # after the headers were read
        if event.stage == "quantize":
            hub.repos["org/tiny"].sent[name] = [right] * 9

    hub.repos["org/tiny"].listed = {"lfs": None, "blobId": None}
    hub.repos["org/tiny"].etags = {name: f"v1-{name}" for name in hub.repos["org/tiny"].files}
    with pytest.raises(Glm4liteError, match=f"{name} has another header than a moment ago"):
        quantize_checkpoint("org/tiny", tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def test_shards_that_lie_in_the_cache_are_not_fetched(
    hub: HubServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    cached = resolve("org/tiny")
    hub.requests.clear()
    assert content(quantize_checkpoint("org/tiny", tmp_path / "out")) == expected
    assert all((cached / path.name).exists() for path in cached.iterdir())
    assert sum("safetensors" in path for method, path in hub.requests) == 2  # the headers


# --- the cache


def test_huggingface_hub_finds_what_was_pulled(hub: HubServer, home: Path) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    folder = resolve("org/tiny")
    found = hf_hub_download("org/tiny", "config.json", cache_dir=home / "hub", local_files_only=True)
    assert Path(found) == folder / "config.json"
    report = scan_cache_dir(home / "hub")
    assert not report.warnings
    assert [(repo.repo_id, repo.nb_files) for repo in report.repos] == [("org/tiny", len(list(folder.iterdir())))]


def test_what_huggingface_hub_downloaded_is_not_fetched_again_where_it_is_right(
    hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in hub.repos["org/tiny"].files:
        hf_hub_download("org/tiny", name, cache_dir=home / "hub")
    hub.requests.clear()
    folder = resolve("org/tiny")
    assert not hub.fetched
    name = "model-00001-of-00002.safetensors"
    blob = (folder / name).resolve()
    (folder / name).unlink()  # as of another commit: the blob is there, and not what its name says
    blob.write_bytes(bytes(blob.stat().st_size))
    assert (resolve("org/tiny") / name).read_bytes() == hub.repos["org/tiny"].files[name]
    assert hub.fetched == {name}


def test_without_links_a_snapshot_holds_the_files(
    hub: HubServer, tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = resolve("org/tiny")
    assert content(folder) == content(tiny)
    assert not any(path.is_symlink() for path in folder.iterdir())
    hub.requests.clear()
    assert resolve("org/tiny") == folder
    assert not hub.fetched


def test_a_mirror_whose_listing_names_no_commit_is_asked_for_it(hub: HubServer, tiny: Path) -> None:
    hub.repos["org/tiny"].names_commit = False
    folder = resolve("org/tiny")
    assert folder.name == hub.repos["org/tiny"].sha
    assert content(folder) == content(tiny)


@pytest.mark.parametrize("listed", [None, {"lfs": None, "blobId": None, "size": None}], ids=["listing", "HEAD too"])
def test_a_host_that_is_busy_for_a_moment_is_asked_again(
    hub: HubServer, tiny: Path, listed: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm4lite.hub.patience.QUESTIONS", Patience(attempts=3, first=0.01, longest=0.02))
    repo = hub.repos["org/tiny"]
    repo.busy, repo.listed = 3, listed or {}
    assert content(resolve("org/tiny")) == content(tiny)
    repo.busy = 4
    hub.requests.clear()
    assert resolve("org/tiny").is_dir()  # from the cache
    assert len(hub.requests) == 4
    if listed is not None:
        repo.busy, repo.names_commit = 3, False
        assert resolve("org/tiny", options=HubOptions(force_download=True)).is_dir()


# --- names


def test_a_short_name_is_a_repo_and_capitals_do_not_matter(home: Path) -> None:
    assert locate("glm-4-9b") == locate("GLM-4-9B-0414") == locate("GLM-4-9b") == "zai-org/GLM-4-9B-0414"
    assert locate("ms:ZhipuAI/GLM-4-9B-0414") == "ms:ZhipuAI/GLM-4-9B-0414"
    assert len({one.name for one in KNOWN}) == len(KNOWN)
    for bad in ("glm-5", "ms:x", "ms:../x", "ms:a/b/c"):
        with pytest.raises(HubError):
            locate(bad)


def test_a_folder_of_the_name_is_taken_first(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "glm-4-9b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("glm-4-9b") == Path("glm-4-9b")


def test_models_are_listed_and_removed_by_the_names_they_are_run_by(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    assert local_models() == []
    resolve("org/tiny")
    quantize_checkpoint("org/tiny", tmp_path / "made" / "tiny-int4")
    listed = {one.name: one for one in local_models()}
    assert set(listed) == {"org/tiny", "tiny-int4"}
    assert {one.state for one in listed.values()} == {"whole"}
    size = sum(path.stat().st_size for path in tiny.iterdir())
    assert size <= listed["org/tiny"].nbytes < size + 100_000
    assert runnable_models() == ["org/tiny", "tiny-int4"]
    assert locate("tiny-int4") == tmp_path / "made" / "tiny-int4"
    for name in listed:
        remove(name)
    assert local_models() == []
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(HubError, match="org/tiny is not on this machine; `glm4lite list` names the models that are"):
        remove("org/tiny")


def test_a_stopped_download_is_listed_as_unfinished(hub: HubServer) -> None:
    def stop(event: Progress) -> None:
        if event.total > 100_000 and event.done > event.total // 2:  # of the weights
            raise KeyboardInterrupt

    hub.repos["org/tiny"].breaks = {"model-00002-of-00002.safetensors": 5000}
    with pytest.raises(KeyboardInterrupt):
        resolve("org/tiny", stop)
    assert [(one.name, one.state) for one in local_models()] == [("org/tiny", "unfinished")]


def test_a_newer_commit_that_cannot_be_fetched_leaves_the_older_usable(hub: HubServer, tiny: Path) -> None:
    first = resolve("org/tiny")
    files = hub.repos["org/tiny"].files
    hub.repos["org/tiny"].files = files | {"chat_template.jinja": b"new", "model-00001-of-00002.safetensors": b"new"}
    hub.repos["org/tiny"].sent = {"model-00001-of-00002.safetensors": [b"wrong"] * 9}
    with pytest.raises(HubError):
        resolve("org/tiny")
    hub.repos["org/tiny"].status = 503
    assert resolve("org/tiny") == first


# --- other hosts


def modelscope(folder: Path, **changes: Any) -> dict[str, bytes]:
    """The answers of ModelScope for a repo of a folder's files."""
    import hashlib
    from urllib.parse import urlencode

    base, entries, found = "/api/v1/models/ZhipuAI/tiny/repo", [], {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"Path": path.name, "Type": "blob", "Size": len(data), "Sha256": digest} | changes)
        found[f"{base}?{urlencode({'Revision': 'master', 'FilePath': path.name})}"] = data
    entries.append({"Path": "onnx", "Type": "tree"})
    listing = json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode()
    return found | {f"{base}/files?Revision=master&Recursive=true": listing}


def test_a_model_comes_from_modelscope_without_the_hubs_token(
    home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with FileServer(modelscope(tiny)) as server:
        monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
        folder = resolve("ms:ZhipuAI/tiny")
        assert content(folder) == content(tiny)
        assert set(server.tokens) == {None}
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
        server.tokens.clear()
        resolve("ms:ZhipuAI/tiny")
        assert set(server.tokens) == {"Bearer ms-secret"}
    assert resolve("ms:ZhipuAI/tiny") == folder  # nobody answers: from the cache
    assert [one.name for one in local_models()] == ["ms:ZhipuAI/tiny"]
    assert resolve("ms:ZhipuAI/tiny", options=HubOptions(local_files_only=True)) == folder


def test_a_wrong_sha256_of_modelscope_is_damage(home: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FileServer(modelscope(tiny, Sha256="0" * 64)) as server:
        monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
        with pytest.raises(HubError, match="arrives damaged from http://127"):
            resolve("ms:ZhipuAI/tiny")
    assert not list(home.rglob("*.safetensors"))


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"Data": 3}', b'{"Success": false, "Message": "no"}', b"{}"])
def test_a_host_that_answers_something_else_is_said(answer: bytes, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/api/v1/models/ZhipuAI/tiny/repo/files?Revision=master&Recursive=true"
    with FileServer({path: answer}) as server:
        monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
        with pytest.raises(HubError, match=f"{server.url} (does not answer as the Hub does|says 'no')"):
            resolve("ms:ZhipuAI/tiny")


GGUF = b"GGUF" + bytes(range(256)) * 400


def test_a_gguf_comes_by_its_address_once(home: Path) -> None:
    import hashlib

    with FileServer({"/m/x.gguf": GGUF, "/m/page.gguf": b"<html>"}) as server:
        found = resolve(f"{server.url}/m/x.gguf")
        assert isinstance(found, Path)
        assert (found.name, found.read_bytes()) == ("x.gguf", GGUF)
        asked = len(server.asked)
        assert resolve(f"{server.url}/m/x.gguf") == found
        assert len(server.asked) == asked
        right = hashlib.sha256(GGUF).hexdigest()
        assert resolve(f"{server.url}/m/x.gguf#sha256={right}").read_bytes() == GGUF
        found.write_bytes(GGUF[:-1] + b"x")
        assert resolve(f"{server.url}/m/x.gguf#sha256={right}").read_bytes() == GGUF
        with pytest.raises(HubError, match="arrives damaged"):
            resolve(f"{server.url}/m/x.gguf#sha256={'0' * 64}")
        with pytest.raises(HubError, match="gives out no GGUF file"):
            resolve(f"{server.url}/m/page.gguf")
        for bad in ("/m/x.bin", "/m/x.gguf#md5=3", "/m/..%2fx.gguf"):
            with pytest.raises(HubError):
                resolve(f"{server.url}{bad}")


def test_all_parts_of_a_split_gguf_come(home: Path) -> None:
    files = {f"/big-{number:05d}-of-00003.gguf": GGUF + bytes([number]) for number in (1, 2, 3)}
    with FileServer(files) as server:
        first = resolve(f"{server.url}/big-00002-of-00003.gguf")
    assert first.name == "big-00001-of-00003.gguf"
    assert [path.read_bytes() for path in sorted(first.parent.glob("*.gguf"))] == list(files.values())


def test_an_address_on_the_hub_is_a_file_of_its_repo(hub: HubServer, home: Path) -> None:
    hub.repos["org/tiny"].files["q/tiny-Q4.gguf"] = GGUF
    found = resolve(f"{hub.url}/org/tiny/blob/main/q/tiny-Q4.gguf")
    assert found.read_bytes() == GGUF
    assert found.is_relative_to(home / "hub" / "models--org--tiny" / "snapshots")
    hub.requests.clear()
    assert resolve(f"{hub.url}/org/tiny/resolve/main/q/tiny-Q4.gguf") == found
    assert not hub.requests


def test_one_of_a_repos_gguf_models_is_chosen_listed_run_and_removed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    files = {"README.md": b"x", "mmproj-a.gguf": GGUF}
    for kind in ("Q4_0", "Q8_0"):
        write_gguf(tmp_path / f"a-{kind}.gguf", kind)
        files[f"a-{kind}.gguf"] = (tmp_path / f"a-{kind}.gguf").read_bytes()
    with HubServer({"org/a": Repo(files)}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for bad, said in (
            ("org/a", r"holds these GGUF models: a-Q4_0 \(.*\), a-Q8_0 \(.*\); give one, as in org/a:Q4_0"),
            ("org/a:Q5_K", "no GGUF model 'Q5_K', but these"),
        ):
            with pytest.raises(HubError, match=said):
                resolve(bad)
        found = resolve("org/a:q8_0")
        assert found.read_bytes() == files["a-Q8_0.gguf"]
        made = quantize_checkpoint("org/a:Q8_0", tmp_path / "int4")
        assert content(made) == content(quantize_checkpoint(tmp_path / "a-Q8_0.gguf", tmp_path / "local"))
    assert resolve("org/a:Q8_0") == found  # nobody answers: from the cache
    assert [(one.name, one.state) for one in local_models()] == [("org/a:a-Q8_0.gguf", "whole")]
    assert runnable_models() == ["org/a:a-Q8_0.gguf"]
    assert resolve("org/a:a-Q8_0.gguf") == found
    assert len(list((tmp_path / "data" / "glm4lite" / "gguf").iterdir())) == 2
    remove("org/a:a-Q8_0.gguf")
    assert local_models() == []
    assert not list(home.rglob("*.gguf"))
    write_gguf(tmp_path / "b.gguf", "Q8_0")
    open_source(tmp_path / "b.gguf")
    left = {path.name.rpartition("-")[0] for path in (tmp_path / "data" / "glm4lite" / "gguf").iterdir()}
    assert left == {"a-Q8_0", "b"}
    assert len(list((tmp_path / "data" / "glm4lite" / "gguf").iterdir())) == 2  # the removed file's are gone


def test_tokenizer_and_config_of_a_repo_of_gguf_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    write_gguf(tmp_path / "a.gguf", "Q8_0")
    data, config = (tmp_path / "a.gguf").read_bytes(), Glm4Config.from_pretrained(tmp_path / "a.gguf").to_dict()
    repos = {"org/one": Repo({"a.gguf": data}), "org/two": Repo({"a-Q8_0.gguf": data, "a-Q4_0.gguf": data})}
    with HubServer(repos) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        for name in ("org/one", "org/two:Q4_0"):
            for _ in range(2):
                assert Glm4Config.from_pretrained(name).to_dict() == config
                assert Tokenizer.from_pretrained(name).ids("Hi") == Tokenizer.from_pretrained(tmp_path / "a.gguf").ids(
                    "Hi"
                )
        assert sum(path.endswith(".gguf") for method, path in hub.requests if method == "GET") == 2  # each once
        for read in (Tokenizer.from_pretrained, Glm4Config.from_pretrained):
            with pytest.raises(HubError, match=r"org/two holds these GGUF models: .*; give one, as in org/two:Q"):
                read("org/two")
    assert Tokenizer.from_pretrained("org/one", local_files_only=True).ids("Hi")


# --- adapters


def adapter_files(scale: float = 1.0) -> dict[str, bytes]:
    """What PEFT writes of an adapter for `tiny`."""
    made = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 96, generator=made)
        tensors[f"{name}.lora_B.weight"] = torch.randn(64, 4, generator=made) * scale
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "org/tiny"}
    return {"adapter_config.json": json.dumps(values).encode(), "adapter_model.safetensors": save(tensors)}


def test_a_repo_of_an_adapter_is_merged_while_its_model_arrives(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    files = adapter_files() | {"README.md": b"x", "optimizer.pt": b"pickle", "adapter_model.bin": b"pickle"}
    hub.repos["org/sql"] = Repo(files)
    folder = tmp_path / "sql"
    folder.mkdir()
    for name, data in adapter_files().items():
        (folder / name).write_bytes(data)
    out = quantize_checkpoint("org/tiny", tmp_path / "out", lora="org/sql=0.5")
    assert content(out) == content(quantize_checkpoint(tiny, tmp_path / "local", lora=f"{folder}=0.5"))
    assert not hub.fetched & {"README.md", "optimizer.pt", "adapter_model.bin"}
    hub.requests.clear()
    beside = load(out, lora="org/sql")  # a second time, over stored weights, of the cache
    assert not [path for _, path in hub.requests if path.endswith("adapter_model.safetensors")]
    assert not torch.equal(beside(IDS).logits, load(out)(IDS).logits)
    assert torch.equal(beside(IDS).logits, load(out, lora=folder)(IDS).logits)


def test_an_adapters_repo_that_cannot_be_used_is_one_line(
    hub: HubServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = adapter_files()
    hub.repos |= {
        "org/sql": Repo(whole),
        "org/pickled": Repo({"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}),
        "org/gated": Repo(whole, token="hf_secret"),
        "org/cut": Repo(whole | {"adapter_model.safetensors": whole["adapter_model.safetensors"][:-9]}),
        "org/broken": Repo(whole, sent={"adapter_model.safetensors": [b"x" * 9] * 9}),
    }
    cases = {
        "org/nothing": "org/nothing",
        "org/tiny": "org/tiny holds no adapter in safetensors; choose a repo with adapter_config.json",
        "org/pickled": "org/pickled holds pickle weights alone",
        "org/gated": "org/gated",
        "org/cut": "adapter_model.safetensors",
        "org/broken": "adapter_model.safetensors",
        "org/sql=fast": "has no scale behind its last =",
        "/nowhere/at/all": "neither a folder nor a Hub repo id; give the folder of an adapter",
    }
    for name, said in cases.items():
        with pytest.raises(Glm4liteError, match=re.escape(said)) as caught:
            load(tiny, lora=name)
        assert "\n" not in str(caught.value)
    load(tiny, lora="org/sql")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load(tiny, lora="org/sql")  # nobody answers: the cache has it


# --- commands


def command(hub: HubServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    made = {"GLM4LITE_MODELS": str(home.parent / "made"), "COLUMNS": "200"}
    return subprocess.run(
        [*python(), "-m", "glm4lite", *arguments],
        env=variables(hub.url, home, **made),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_pull_list_and_rm(hub: HubServer, home: Path) -> None:
    pulled = command(hub, home, "pull", "org/tiny", "--quant", "int4")
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stderr.endswith("Run it: glm4lite chat tiny-int4\n")
    hub.repos["org/sql"] = Repo(adapter_files())
    merged = command(hub, home, "pull", "org/tiny", "--quant", "int4", "--lora", "org/sql=0.5")
    assert merged.stderr.endswith("Run it: glm4lite chat tiny-sql-0.5-int4\n"), merged.stderr
    assert command(hub, home, "rm", "tiny-sql-0.5-int4").returncode == 0
    plain = command(hub, home, "pull", "org/tiny", "--json")
    assert json.loads(plain.stdout.splitlines()[-1])["stage"] == "download"
    listed = command(hub, home, "list", "--json")
    assert [one["name"] for one in json.loads(listed.stdout)["models"]] == ["org/tiny", "tiny-int4"]
    gone = command(hub, home, "rm", "org/tiny", "tiny-int4")
    assert gone.stdout.splitlines()[0].startswith("removed org/tiny: ")
    assert command(hub, home, "list").stdout.startswith("no model is on this machine but nano")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pull", "nano"), "nano is on this machine already"),
        (("pull", "org/tiny", "--from", "moon"), "--from is 'moon'; use hub or modelscope"),
        (("pull", "org/tiny", "--to", "x"), "--to is for --quant"),
        (("pull", "org/tiny", "--lora", "x"), "--lora is for --quant"),
        (("pull", "org/tiny", "--quant", "nf4"), "nf4 is made while a model loads"),
        (("rm", "org/none"), "org/none is not on this machine"),
    ],
    ids=str,
)
def test_what_cannot_be_pulled_or_removed_is_one_line(
    arguments: tuple[str, ...], said: str, hub: HubServer, home: Path
) -> None:
    done = command(hub, home, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


def test_the_known_models_are_listed_with_what_fits(hub: HubServer, home: Path) -> None:
    found = json.loads(command(hub, home, "list", "--known", "--json").stdout)["models"]
    nine = next(one for one in found if one["name"] == "glm-4-9b")
    assert round(nine["download_bytes"] / 1e9, 1) == 18.8
    assert 5.4 < nine["int4_bytes"] / 2**30 < 5.6
    assert all(one["fits"] for one in found)
    assert not hub.requests


# --- with bits for each weight


def test_a_model_pulled_with_bits_is_fetched_whole_and_is_the_one_of_a_folder(
    hub: HubServer, tiny: Path, home: Path, tmp_path: Path
) -> None:
    aim = Aim(5.0)

    def stop(event: Progress) -> None:
        if event.stage == "quantize" and event.done > event.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint("org/tiny", tmp_path / "out", progress=stop, aim=aim)
    assert not (tmp_path / "out").exists()
    before = len(hub.requests)
    out = quantize_checkpoint("org/tiny", tmp_path / "out", aim=aim)
    assert not [path for method, path in hub.requests[before:] if method == "GET" and path.endswith(".safetensors")]
    assert content(out) == content(quantize_checkpoint(tiny, tmp_path / "local", aim=aim))
