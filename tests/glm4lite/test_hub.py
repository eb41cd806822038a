"""Finding models: the embedded one, folders, and repos downloaded from a real server on loopback.

huggingface_hub reads its environment when it is imported, so each download runs in a process of its own.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glm4lite.base.errors import HubError
from glm4lite.checkpoint.checkpoint import Checkpoint
from glm4lite.hub.sources import nano_folder, resolve
from glm4lite.hub.verified import NOTES
from tests.glm4lite.checkpoints import write_checkpoint
from tests.glm4lite.hub_server import HubServer, Repo, is_large

RESOLVE = """
import json, logging, sys
from glm4lite.base.errors import HubError
from glm4lite.hub.sources import resolve

class Stop(Exception):
    pass

def watch(event):
    events.append([event.stage, event.done, event.total, event.unit])
    if sys.argv[1] == "stop":
        raise Stop
    if sys.argv[1] == "pipe":
        raise BrokenPipeError(32, "Broken pipe")
    if sys.argv[1] == "full":
        raise OSError(28, "No space left on device")

class Notices(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

logging.getLogger("glm4lite").addHandler(Notices())
for source in sys.argv[2:]:
    events, said = [], []
    try:
        found = {"folder": str(resolve(source, watch))}
    except HubError as error:
        found = {"error": str(error)}
    except Stop:
        found = {"stopped": True}
    except OSError as error:
        found = {"raised": error.errno}
    print(json.dumps(found | {"events": events, "said": said}))
print(json.dumps({"torch": "torch" in sys.modules}))
"""


def variables(endpoint: str, home: Path, **extra: str) -> dict[str, str]:
    """The environment of a process whose Hub is `endpoint`."""
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")
    inherited = {key: value for key, value in os.environ.items() if key not in names and "proxy" not in key.lower()}
    return inherited | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | extra


def find(endpoint: str, home: Path, *sources: str, mode: str = "", **extra: str) -> list[dict[str, Any]]:
    """What `resolve` gives for each source in a fresh process; the last item tells about the process itself."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, mode, *sources],
        env=variables(endpoint, home, **extra),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def leftovers(home: Path) -> list[Path]:
    return list(home.rglob("*.incomplete"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def hub(tiny: Path) -> Iterator[HubServer]:
    extra = {
        "pytorch_model.bin": b"pickle",
        "modeling_evil.py": b"raise SystemExit",
        "onnx/model-00001-of-00001.safetensors": b"other",
        "README.md": b"# tiny",
    }
    repos = {
        "org/tiny": Repo(Repo.of(tiny).files | extra),
        "org/pickle": Repo({"config.json": b"{}", "pytorch_model.bin": bytes(100), "modeling.py": b""}),
        "org/gguf": Repo({"model-Q4.gguf": b"GGUF", "model-Q8.gguf": b"GGUF"}),
        "org/adapter": Repo({"model.safetensors": b"", "adapter_config.json": b"{}"}),
        "org/lora": Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}),
        "org/strange": Repo({"config.json": b"{}", "consolidated.safetensors": b""}),
        "org/gated": Repo(Repo.of(tiny).files, token="hf_secret"),
        "org/down": Repo(status=503),
        "org/private": Repo(status=401),
        "org/silent": Repo(Repo.of(tiny).files, listed={"lfs": None, "blobId": None, "size": None}),
    }
    with HubServer(repos) as server:
        yield server


# --- without a network


def test_nano_is_the_embedded_checkpoint() -> None:
    assert resolve("nano") == nano_folder()
    assert (nano_folder() / "config.json").exists()


def test_a_folder_is_itself(tiny: Path) -> None:
    assert resolve(tiny) == tiny
    assert resolve(str(tiny)) == tiny


@pytest.mark.parametrize("source", ["./missing", "/missing/model", "~/missing-model", "a/b/c", "missing/", "..\\x"])
def test_a_path_that_does_not_exist_is_said(source: str) -> None:
    with pytest.raises(HubError) as caught:
        resolve(source)
    assert str(caught.value) == (
        f"{source} does not exist; give a folder, a Hub repo id (organisation/name, for example "
        "zai-org/GLM-4-9B-0414), or nano"
    )


def test_a_file_is_not_a_model(tiny: Path) -> None:
    with pytest.raises(HubError) as caught:
        resolve(tiny / "config.json")
    assert str(caught.value) == (
        f"{tiny}/config.json is a file; give the folder that holds config.json and the safetensors files"
    )


@pytest.mark.parametrize("source", ["gpt", "my model", "a/b c", "a..b/c", "org/name.git"])
def test_a_name_that_is_no_repo_id_is_said(source: str) -> None:
    with pytest.raises(HubError) as caught:
        resolve(source)
    assert str(caught.value).startswith(
        f"{source!r} is neither a folder nor a Hub repo id; give a folder, a Hub repo id"
    )


@pytest.mark.parametrize("source", ["x" * 300, "org/" + "y" * 300, "./" + "z" * 5000])
def test_a_name_too_long_for_a_file_is_said(source: str) -> None:
    with pytest.raises(HubError) as caught:
        resolve(source)
    message = str(caught.value)
    assert message.endswith(
        "; give a folder, a Hub repo id (organisation/name, for example zai-org/GLM-4-9B-0414), or nano"
    )
    assert len(message) < 300


def test_a_home_folder_that_is_not_there_is_said() -> None:
    with pytest.raises(HubError, match=r"^~nosuchuser/model does not exist; give a folder, "):
        resolve("~nosuchuser/model")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may look everywhere")
def test_a_folder_that_may_not_be_looked_into_is_said(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(HubError, match=r"closed/model cannot be opened \(Permission denied\); give a folder, "):
        resolve(tmp_path / "closed" / "model")


# --- from the server


def test_a_repo_is_downloaded_without_pickle_and_code(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    found, process = find(hub.url, tmp_path, "org/tiny")
    folder = Path(found["folder"])
    wanted = {path.name for path in tiny.iterdir()}
    assert {path.name for path in folder.iterdir()} == wanted
    assert hub.fetched == wanted
    for path in tiny.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    size = sum(path.stat().st_size for path in tiny.iterdir())
    downloads = [event for event in found["events"] if event[0] == "download"]
    assert downloads[-1] == ["download", size, size, "bytes"]
    assert [event[1] for event in downloads] == sorted(event[1] for event in downloads)
    assert found["said"] == []
    assert process == {"torch": False}


def test_a_downloaded_repo_works_offline_and_is_not_fetched_twice(hub: HubServer, tmp_path: Path) -> None:
    first, again, _ = find(hub.url, tmp_path, "org/tiny", "org/tiny")
    assert again == {"folder": first["folder"], "events": [], "said": []}
    assert hub.fetched == {path.name for path in Path(first["folder"]).iterdir()}
    asked = len(hub.requests)
    offline, absent, _ = find(hub.url, tmp_path, "org/tiny", "org/other", HF_HUB_OFFLINE="1")
    assert offline == {"folder": first["folder"], "events": [], "said": []}
    assert absent["error"] == (
        "org/other is not (or not wholly) in the cache and HF_HUB_OFFLINE is set; unset it to download"
    )
    assert len(hub.requests) == asked
    unreachable, _ = find(_closed_port(), tmp_path, "org/tiny")
    assert unreachable["folder"] == first["folder"]


def test_repos_that_cannot_be_used_are_named_with_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    sources = [
        "org/none",
        "org/pickle",
        "org/gguf",
        "org/adapter",
        "org/lora",
        "org/strange",
        "org/gated",
        "org/down",
        "org/private",
    ]
    *found, _ = find(hub.url, tmp_path, *sources)
    expected = [
        f"org/none does not exist on {hub.url}, or is private; check the name (for example zai-org/GLM-4-9B-0414), "
        "or set HF_TOKEN to a token that may read it",
        "org/pickle holds only pickle weights (pytorch_model.bin), which can run code when opened; "
        "choose a repo with safetensors (the zai-org 0414 and -hf repos have them)",
        "org/gguf holds these GGUF models: model-Q4 (0 KiB), model-Q8 (0 KiB); give one, as in org/gguf:Q4",
        "org/adapter has no config.json; choose a repo that holds a whole model, not an adapter",
        "org/lora holds an adapter (LoRA), no whole model; give its base model, and the adapter as --lora",
        "org/strange has neither model.safetensors nor model.safetensors.index.json, which would say what "
        "consolidated.safetensors hold; choose another repo",
        f"org/gated is gated: accept its terms on {hub.url}/org/gated, then run `hf auth login` or set HF_TOKEN to a "
        "token that may read it",
        f"org/down: {hub.url} answered HTTP 503; try again later, or set HF_ENDPOINT to a mirror",
        f"org/private: {hub.url} refused access (HTTP 401); set HF_TOKEN to a token that may read it, or run "
        "`hf auth login`",
    ]
    assert [item.get("error") for item in found] == expected
    assert hub.fetched == set()


def test_a_token_opens_a_gated_repo(hub: HubServer, tmp_path: Path) -> None:
    found, _ = find(hub.url, tmp_path, "org/gated", HF_TOKEN="hf_secret")
    assert "folder" in found


def test_no_network_is_said(tmp_path: Path) -> None:
    endpoint = _closed_port()
    found, _ = find(endpoint, tmp_path, "org/tiny")
    assert found["error"].startswith(f"{endpoint} cannot be reached (")
    assert found["error"].endswith(
        ") and org/tiny is not (or not wholly) in the cache; check the network, or set HF_ENDPOINT to a mirror"
    )
    assert "\n" not in found["error"]


def test_a_stop_ends_the_download_and_the_next_one_goes_on(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    found, _ = find(hub.url, tmp_path, "org/tiny", mode="stop")
    assert found["stopped"] is True
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert all(Path(found["folder"], path.name).read_bytes() == path.read_bytes() for path in tiny.iterdir())
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("mode", "errno"), [("pipe", 32), ("full", 28)])
def test_an_error_of_the_progress_callback_is_not_taken_for_the_downloads(
    hub: HubServer, tmp_path: Path, mode: str, errno: int
) -> None:
    found, _ = find(hub.url, tmp_path, "org/tiny", mode=mode)
    assert found.get("raised") == errno, found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    tool = shutil.which("mount")
    command = [tool or "mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if tool is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_too_small_for_a_repo_is_said_before_the_download(hub: HubServer, small_disk: Path) -> None:
    found, _ = find(hub.url, small_disk, "org/tiny")
    assert found["error"].startswith("org/tiny needs 2")
    assert found["error"].endswith(
        f" free in {small_disk}/hub; free some space, or set HF_HOME to a folder on another disk"
    )
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_disk_that_fills_while_downloading_is_said(hub: HubServer, small_disk: Path) -> None:
    """The listing tells no sizes, so that it could not be said before."""
    hub.repos["org/tiny"].listed = {"size": None}
    found, _ = find(hub.url, small_disk, "org/tiny")
    assert found["error"].startswith("org/tiny: the disk is full (")
    assert found["error"].endswith("); free some space, or set HF_HOME to a folder on another disk")


def test_a_file_longer_than_its_listing_says_is_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.repos["org/tiny"].claimed = 1
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert found["error"].endswith(
        f"at {hub.url}, but 1 in its listing; run it again later, or set HF_ENDPOINT to another mirror"
    )


# --- which files belong to a model


def renamed(folder: Path, old: str, new: str) -> dict[str, bytes]:
    """A folder's files with its shards called otherwise, as the index says."""
    files = Repo.of(folder).files
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"] = {tensor: file.replace(old, new) for tensor, file in index["weight_map"].items()}
    found = {name.replace(old, new) if name.startswith(old) and is_large(name) else name: files[name] for name in files}
    return found | {"model.safetensors.index.json": json.dumps(index).encode()}


@pytest.mark.parametrize("new", ["model.safetensors-", "pytorch_model-", "[a]-"])
def test_shards_are_those_the_index_names(new: str, hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    files = renamed(tiny, "model-", new)
    hub.repos["org/tiny"] = Repo(files | {"consolidated.safetensors": b"other", "a-1.safetensors": b"other"})
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert {path.name for path in Path(found["folder"]).iterdir()} == set(files)
    assert hub.fetched == set(files)


def test_a_single_file_is_taken_before_an_index(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.repos["org/tiny"].files["model.safetensors"] = b"whole"
    find(hub.url, tmp_path, "org/tiny")
    assert {name for name in hub.fetched if is_large(name)} == {"model.safetensors"}


NO_NAMES = ["../../x", "/etc/x", "a\\b", "nul", "a\x00b", "x:y", "a/b", "../.."]


def test_an_index_names_only_files_of_its_folder(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    for number, name in enumerate(NO_NAMES):
        file = f"{name}.safetensors"
        index = json.dumps({"weight_map": {"lm_head.weight": file}}).encode()
        hub.repos[f"org/bad{number}"] = Repo(
            Repo.of(tiny).files | {"model.safetensors.index.json": index, file: b"bad"}
        )
    *found, _ = find(hub.url, tmp_path, *(f"org/bad{number}" for number in range(len(NO_NAMES))))
    for result in found:
        assert "puts lm_head.weight in " in result["error"]
        assert "only .safetensors files of the same folder are read" in result["error"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_index_that_names_what_the_repo_lacks_is_said_before_the_shards(hub: HubServer, tmp_path: Path) -> None:
    del hub.repos["org/tiny"].files["model-00002-of-00002.safetensors"]
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert found["error"] == (
        "org/tiny lacks model-00002-of-00002.safetensors, named by its model.safetensors.index.json; "
        "choose another repo"
    )
    assert not any(is_large(name) for name in hub.fetched)


def test_a_shard_of_computed_buffers_alone_may_be_missing(hub: HubServer, tmp_path: Path) -> None:
    files = hub.repos["org/tiny"].files
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["model.rotary_emb.inv_freq"] = "buffers.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert Checkpoint.open(found["folder"]).names()
    offline, _ = find(hub.url, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")
    assert offline["folder"] == found["folder"]


def test_a_listing_may_be_long_and_hold_anything(hub: HubServer, tmp_path: Path) -> None:
    names = [*NO_NAMES, *(f"old-{index}.safetensors" for index in range(5000))]
    hub.repos["org/tiny"].extra = [{"rfilename": name, "size": -1, "blobId": 7, "lfs": {}} for name in names]
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert "folder" in found
    assert not any(name.startswith("old-") for name in hub.fetched)


# --- what arrives is what the Hub describes

SHARD = "model-00001-of-00002.safetensors"


def flipped(data: bytes, count: int = 400) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + count]) + data[middle + count :]


def test_files_that_arrive_damaged_are_downloaded_again(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    repo = hub.repos["org/tiny"]
    names = [SHARD, "config.json", "tokenizer.json", "model.safetensors.index.json"]
    repo.sent = {name: [flipped(repo.files[name])] for name in names}
    found, _ = find(hub.url, tmp_path, "org/tiny")
    for name in names:
        assert Path(found["folder"], name).read_bytes() == repo.files[name]
    assert sorted(line.partition(" of org/tiny ")[0] for line in found["said"]) == sorted(names)
    assert all(line.endswith("; it is downloaded again") for line in found["said"])


def test_a_file_that_is_damaged_each_time_is_an_error_and_leaves_the_cache(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.repos["org/tiny"]
    right, wrong = repo.files[SHARD], flipped(repo.files[SHARD])
    repo.sent[SHARD] = [wrong] * 3
    found, again, _ = find(hub.url, tmp_path, "org/tiny", "org/tiny")
    digests = [hashlib.sha256(data).hexdigest() for data in (wrong, right)]
    assert found["error"] == (
        f"org/tiny: {SHARD} arrives damaged from {hub.url} each time "
        f"(sha256:{digests[0]} instead of sha256:{digests[1]}); "
        "run it again later, or set HF_ENDPOINT to another mirror"
    )
    assert Path(again["folder"], SHARD).read_bytes() == right
    assert wrong not in [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("ranges", [True, False], ids=["the rest", "all of it"])
def test_a_download_that_goes_on_with_another_file_is_downloaded_again(
    ranges: bool, hub: HubServer, tmp_path: Path
) -> None:
    """The connection breaks in the middle, and what comes then is of another revision."""
    repo = hub.repos["org/tiny"]
    other = bytes(reversed(repo.files[SHARD]))
    repo.breaks, repo.sent, repo.ranges = {SHARD: 30_000}, {SHARD: [repo.files[SHARD], other]}, ranges
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert Path(found["folder"], SHARD).read_bytes() == repo.files[SHARD]
    assert len(found["said"]) == 1
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("offline", [True, False])
def test_what_lies_in_the_cache_damaged_is_named_and_replaced(offline: bool, hub: HubServer, tmp_path: Path) -> None:
    repo = hub.repos["org/tiny"]
    found, _ = find(hub.url, tmp_path, "org/tiny")
    blob = Path(found["folder"], SHARD).resolve()
    blob.write_bytes(flipped(blob.read_bytes()))
    if offline:
        found, _ = find(hub.url, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")
        assert found["error"].startswith(f"{SHARD} of org/tiny lies in the cache damaged (sha256:")
        assert found["error"].endswith(
            "; run it again with a network and without HF_HUB_OFFLINE, it is downloaded anew then"
        )
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert found["said"][0].startswith(f"{SHARD} of org/tiny lay in the cache damaged (sha256:")
    assert Path(found["folder"], SHARD).read_bytes() == repo.files[SHARD]


def test_what_another_program_downloaded_is_verified_once(hub: HubServer, tmp_path: Path) -> None:
    found, _ = find(hub.url, tmp_path, "org/tiny")
    (notes,) = tmp_path.rglob(NOTES)
    notes.unlink()
    first, second, _ = find(hub.url, tmp_path, "org/tiny", "org/tiny", HF_HUB_OFFLINE="1")
    assert {event[0] for event in first["events"]} == {"verify"}
    assert second["events"] == []
    notes.write_text('{"x": 3}')
    damaged_notes, _ = find(hub.url, tmp_path, "org/tiny")
    assert damaged_notes["folder"] == found["folder"]


def test_a_listing_without_checksums_is_said_once_and_an_etag_that_is_a_hash_counts(
    hub: HubServer, tiny: Path, tmp_path: Path
) -> None:
    silent = {"lfs": None, "blobId": None, "size": None}
    names = Repo.of(tiny).files
    hub.repos["org/silent"] = Repo(names, listed=silent, etags={name: f"v1-{name}" for name in names})
    hub.repos["org/etag"] = Repo(names, listed=silent, sent={SHARD: [flipped(names[SHARD])]})
    silent_one, silent_again, etag, _ = find(hub.url, tmp_path, "org/silent", "org/silent", "org/etag")
    assert all(line.endswith(": what arrives cannot be verified") for line in silent_one["said"])
    assert silent_one["said"]
    assert silent_again["said"] == []
    assert [line.partition(" of ")[0] for line in etag["said"]] == [SHARD]


def test_a_cache_that_cannot_be_written_is_used_as_it_is(hub: HubServer, tmp_path: Path) -> None:
    found, _ = find(hub.url, tmp_path, "org/tiny")
    tool = shutil.which("mount")
    mount, folder = tool or "mount", str(tmp_path)
    mounts = [[mount, "--bind", folder, folder], [mount, "-o", "remount,bind,ro", folder]]
    if tool is None or subprocess.run(mounts[0], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root on Linux")
    try:
        subprocess.run(mounts[1], check=True)
        again, _ = find(hub.url, tmp_path, "org/tiny")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert again == {"folder": found["folder"], "events": [], "said": []}


@pytest.mark.skipif(os.name != "posix", reason="no locks that end with their process")
def test_what_killed_downloads_left_is_removed_and_what_is_written_stays(hub: HubServer, tmp_path: Path) -> None:
    find(hub.url, tmp_path, "org/tiny")
    kept = tmp_path / "hub" / "models--org--tiny"
    locks = tmp_path / "hub" / ".locks" / kept.name
    names = [partial_file.removesuffix(".lock") for partial_file in sorted(os.listdir(locks))[:2]]
    dead, living = (kept / "blobs" / f"{name}.0123abcd.incomplete" for name in names)
    dead.write_bytes(bytes(1000))
    living.write_bytes(b"")
    import fcntl

    with (locks / f"{names[1]}.lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found, _ = find(hub.url, tmp_path, "org/tiny")
    assert leftovers(tmp_path) == [living]
    assert found["said"] == [
        "removed 1 unfinished files of org/tiny (1 KiB), which downloads that were killed had left in the cache"
    ]


# --- servers that are no Hub, and what the environment says about it


def test_a_token_is_not_sent_to_another_host(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    with HubServer({"org/gated": Repo(Repo.of(tiny).files)}) as storage:
        hub.repos["org/gated"].elsewhere = storage.url.replace("127.0.0.1", "localhost")
        found, _ = find(hub.url, tmp_path, "org/gated", HF_TOKEN="hf_secret")
    assert "folder" in found
    assert {name for _, name in storage.authorizations} == {None}
    assert len(storage.authorizations) >= 2
    assert "Bearer hf_secret" in {name for _, name in hub.authorizations}


@pytest.mark.parametrize("etag", ["../../../../escaped", "..", "a\\b"])
def test_an_etag_does_not_leave_the_cache(etag: str, hub: HubServer, tmp_path: Path) -> None:
    """A file whose digest the listing tells is called by that; others by their tag."""
    hub.repos["org/tiny"].etags = hub.repos["org/silent"].etags = {SHARD: etag}
    told, silent, _ = find(hub.url, tmp_path / "a" / "b", "org/tiny", "org/silent")
    assert "folder" in told
    assert silent["error"].startswith(f"{hub.url} calls a file by the ETag {etag!r}, which leaves the cache's folder")
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_login_page_of_the_network_is_said_and_the_cache_is_used(hub: HubServer, tmp_path: Path) -> None:
    first, _ = find(hub.url, tmp_path, "org/tiny")
    for name in ("org/tiny", "org/down"):
        hub.repos[name] = Repo(page=b"<html>Please log in</html>")
    again, absent, _ = find(hub.url, tmp_path, "org/tiny", "org/down")
    assert again["folder"] == first["folder"]
    assert absent["error"] == (
        f"org/down: {hub.url} does not answer as the Hub does; if this network asks for a login in a browser, do that "
        "first, else check HF_ENDPOINT"
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"HF_TOKEN": "hf_\u00e9"},
            "the Hub's token (HF_TOKEN, or what `hf auth login` stored) holds what no token has",
        ),
        ({"HF_TOKEN": "a b"}, "the Hub's token (HF_TOKEN, or what `hf auth login` stored) holds what no token has"),
        ({"HF_TOKEN_PATH": "/"}, "the Hub's token in / cannot be read ("),
        (
            {"HF_ENDPOINT": "huggingface.co"},
            "HF_ENDPOINT is 'huggingface.co'; use a URL such as https://huggingface.co",
        ),
        ({"HF_ENDPOINT": ""}, "HF_ENDPOINT is ''; use a URL"),
        ({"HF_ENDPOINT": "http://[::1"}, "HF_ENDPOINT is 'http://[::1'; use a URL"),
        ({"HF_HUB_ETAG_TIMEOUT": "soon"}, "HF_HUB_ETAG_TIMEOUT is 'soon'; use a whole number of seconds"),
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "the environment names a SOCKS proxy"),
        ({"HTTP_PROXY": "abc://x"}, "the environment names a proxy that cannot be used ("),
        ({"HTTP_PROXY": "http://127.0.0.1:9"}, "http://127.0.0.1:1 cannot be reached ("),
        ({"SSL_CERT_FILE": "/nonexistent"}, "SSL_CERT_FILE is '/nonexistent', which cannot be read"),
        ({"HF_HOME": "/dev/null/x"}, "the Hub's token in /dev/null/x/token cannot be read (Not a directory); "),
        ({"SSL_CERT_FILE": __file__}, "this machine's certificates cannot be used ("),
    ],
    ids=str,
)
def test_a_wrong_environment_is_one_line(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    found, *_ = find("http://127.0.0.1:1", tmp_path, "org/tiny", **variables)
    assert found.get("error", str(found)).startswith(message)
    assert "\n" not in found["error"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "accept the repo's terms"),
        (429, "too many requests"),
        (404, "answered HTTP 404"),
        (500, "answered HTTP 500"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(status: int, message: str, hub: HubServer, tmp_path: Path) -> None:
    hub.repos["org/tiny"].status = status
    found, _ = find(hub.url, tmp_path, "org/tiny")
    assert message in found["error"]
    assert "\n" not in found["error"]


def _closed_port() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
