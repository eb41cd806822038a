"""Finding models: the embedded one, folders, and repos downloaded from a real server on loopback.

huggingface_hub reads its environment when it is imported, so each download runs in a process of its own.
"""

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

from glm4lite.errors import HubError
from glm4lite.hub import nano_folder, resolve
from tests.glm4lite.checkpoints import write_checkpoint
from tests.glm4lite.hub_server import HubServer, Repo

RESOLVE = """
import json, sys
from glm4lite.errors import HubError
from glm4lite.hub import resolve

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

for source in sys.argv[2:]:
    events = []
    try:
        found = {"folder": str(resolve(source, watch))}
    except HubError as error:
        found = {"error": str(error)}
    except Stop:
        found = {"stopped": True}
    except OSError as error:
        found = {"raised": error.errno}
    print(json.dumps(found | {"events": events}))
import os
print(json.dumps({"xet_off": os.environ.get("HF_HUB_DISABLE_XET"), "torch": "torch" in sys.modules}))
"""


def find(endpoint: str, home: Path, *sources: str, mode: str = "", **extra: str) -> list[dict[str, Any]]:
    """What `resolve` gives for each source in a fresh process; the last item tells about the process itself."""
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE")
    inherited = {key: value for key, value in os.environ.items() if key not in names and "proxy" not in key.lower()}
    variables = inherited | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | extra
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, mode, *sources],
        env=variables,
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
        "org/gguf": Repo({"model-Q4.gguf": b"GGUF"}),
        "org/adapter": Repo({"model.safetensors": b"", "adapter_config.json": b"{}"}),
        "org/gated": Repo(Repo.of(tiny).files, token="hf_secret"),
        "org/down": Repo(status=503),
        "org/private": Repo(status=401),
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
    assert found["events"][-1] == ["download", size, size, "bytes"]
    assert [event[1] for event in found["events"]] == sorted(event[1] for event in found["events"])
    assert process == {"xet_off": "1", "torch": False}


def test_a_downloaded_repo_works_offline_and_is_not_fetched_twice(hub: HubServer, tmp_path: Path) -> None:
    first, again, _ = find(hub.url, tmp_path, "org/tiny", "org/tiny")
    assert again == {"folder": first["folder"], "events": []}
    asked = len(hub.requests)
    offline, absent, _ = find(hub.url, tmp_path, "org/tiny", "org/other", HF_HUB_OFFLINE="1")
    assert offline == {"folder": first["folder"], "events": []}
    assert absent["error"] == (
        "org/other is not (or not wholly) in the cache and HF_HUB_OFFLINE is set; unset it to download"
    )
    assert len(hub.requests) == asked
    unreachable, _ = find(_closed_port(), tmp_path, "org/tiny")
    assert unreachable["folder"] == first["folder"]


def test_repos_that_cannot_be_used_are_named_with_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    sources = ["org/none", "org/pickle", "org/gguf", "org/adapter", "org/gated", "org/down", "org/private"]
    *found, _ = find(hub.url, tmp_path, *sources)
    expected = [
        f"org/none does not exist on {hub.url}, or is private; check the name (for example zai-org/GLM-4-9B-0414), "
        "or set HF_TOKEN to a token that may read it",
        "org/pickle holds only pickle weights (pytorch_model.bin), which can run code when opened; "
        "choose a repo with safetensors (the zai-org 0414 and -hf repos have them)",
        "org/gguf holds no safetensors weights (found model-Q4.gguf); choose a repo with safetensors",
        "org/adapter has no config.json; choose a repo that holds a whole model, not an adapter",
        f"org/gated is gated: accept its terms on {hub.url}/org/gated, then run `hf auth login` or set HF_TOKEN to a "
        "token that may read it",
        f"org/down: {hub.url} answered HTTP 503; try again later, or set HF_ENDPOINT to a mirror",
        f"org/private: {hub.url} refused access (HTTP 401); set HF_TOKEN to a token that may read it",
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


def test_a_stop_ends_the_download_and_leaves_no_partial_files(hub: HubServer, tmp_path: Path) -> None:
    found, _ = find(hub.url, tmp_path, "org/tiny", mode="stop")
    assert found["stopped"] is True
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
    assert hub.fetched == set()


def test_a_disk_that_fills_while_downloading_is_said(hub: HubServer, small_disk: Path) -> None:
    hub.repos["org/tiny"].claimed = 1
    found, _ = find(hub.url, small_disk, "org/tiny")
    assert found["error"].startswith("org/tiny: the disk is full (")
    assert found["error"].endswith("); free some space, or set HF_HOME to a folder on another disk")
    assert leftovers(small_disk) == []


def _closed_port() -> str:
    """An address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
