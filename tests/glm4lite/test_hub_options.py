"""Which state of a Hub repo from_pretrained takes, and how: revision, subfolder, cache, token, with or without network.

A real server on loopback; huggingface_hub reads its environment when it is imported, so in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import python
from tests.glm4lite.checkpoints import tiny_config, write_checkpoint
from tests.glm4lite.hub_server import HubServer, Repo
from tests.glm4lite.test_hub import variables

LOAD = """
import json, sys
from glm4lite import Glm4Config, Glm4ForCausalLM
from glm4lite.base.errors import Glm4liteError

for source, options in json.loads(sys.argv[1]):
    try:
        if options.pop("config only", False):
            config = Glm4Config.from_pretrained(source, **options)
        else:
            config = Glm4ForCausalLM.from_pretrained(source, **options).config
        print(json.dumps({"eps": config.rms_norm_eps, "name": config.name_or_path}))
    except Glm4liteError as error:
        print(json.dumps({"error": str(error)}))
"""
EPS = 0.125
"""Of the model in the subfolder."""


def loads(hub: HubServer, home: Path, *wanted: dict[str, Any], **extra: str) -> list[dict[str, Any]]:
    """What loading org/tiny with each of the options gives, one after the other in one process."""
    listed = json.dumps([[options.pop("source", "org/tiny"), options] for options in wanted])
    done = subprocess.run(
        [*python(), "-c", LOAD, listed],
        env=variables(hub.url, home, **extra),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("source")
    whole = Repo.of(write_checkpoint(place / "tiny")).files
    inner = Repo.of(write_checkpoint(place / "inner", tiny_config(rms_norm_eps=EPS))).files
    return whole | {f"deep/inner/{name}": data for name, data in inner.items()}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[HubServer]:
    tiny = Repo(dict(files), branches=("main", "v1", "refs/pr/2"))
    with HubServer({"org/tiny": tiny, "org/gated": Repo(dict(files), token="hf_secret")}) as server:
        yield server


def test_a_revision_is_taken_and_found_again_without_the_hub(hub: HubServer, tmp_path: Path) -> None:
    online = loads(hub, tmp_path, {"revision": "v1"}, {"revision": "v9"}, {"revision": hub.repos["org/tiny"].sha})
    assert online[0] == online[2] == {"eps": 1e-5, "name": "org/tiny"}
    assert online[1]["error"].startswith(
        f"org/tiny on {hub.url} has no such revision; give a branch, a tag or a commit"
    )
    assert ("GET", "/api/models/org/tiny/revision/v1") in hub.requests
    hub.requests.clear()
    cached = loads(hub, tmp_path, {"revision": "v1", "local_files_only": True}, {"local_files_only": True})
    assert cached[0]["eps"] == 1e-5
    assert "local_files_only forbids to download it" in cached[1]["error"]  # main was never asked for
    assert not hub.requests


def test_a_subfolder_is_a_model_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    found = loads(hub, tmp_path, {"subfolder": "deep/inner"}, {"subfolder": "deep/inner/"}, {"subfolder": "deep"})
    assert [one.get("eps") for one in found] == [EPS, EPS, None]
    assert "org/tiny" in found[2]["error"]
    assert found[2]["error"].startswith("org/tiny holds no safetensors weights")
    fetched = {path for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert all("/deep/inner/" in path for path in fetched)
    assert [one["eps"] for one in loads(hub, tmp_path, {"subfolder": "deep/inner"}, HF_HUB_OFFLINE="1")] == [EPS]


def test_a_damaged_file_of_a_subfolder_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    name = "deep/inner/model-00001-of-00002.safetensors"
    data = hub.repos["org/tiny"].files[name]
    hub.repos["org/tiny"].sent[name] = [bytes(len(data))]
    assert loads(hub, tmp_path, {"subfolder": "deep/inner"})[0] == {"eps": EPS, "name": "org/tiny"}
    hub.repos["org/tiny"].sent[name] = [bytes(len(data))] * 9
    broken = loads(hub, tmp_path / "other", {"subfolder": "deep/inner"})[0]["error"]
    assert "arrives damaged" in broken
    assert not [path for path in (tmp_path / "other").rglob("*") if path.is_file() and path.stat().st_size == len(data)]


def test_a_cache_of_ones_own_is_used_and_remembered(hub: HubServer, tmp_path: Path) -> None:
    own = str(tmp_path / "own")
    assert "eps" in loads(hub, tmp_path / "home", {"cache_dir": own})[0]
    assert (tmp_path / "own" / "models--org--tiny").is_dir()
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert "eps" in loads(hub, tmp_path / "home", {"cache_dir": own, "local_files_only": True})[0]


def sent(hub: HubServer) -> set[str | None]:
    """The authorizations of all requests for a model."""
    return {authorization for path, authorization in hub.authorizations if "org/" in path}


def test_only_the_token_that_is_given_is_sent(hub: HubServer, tmp_path: Path) -> None:
    gated: dict[str, Any] = {"source": "org/gated"}
    found = loads(hub, tmp_path, gated | {"token": "hf_secret"})
    assert "eps" in found[0]
    assert sent(hub) == {"Bearer hf_secret"}
    hub.authorizations.clear()
    refused = loads(
        hub, tmp_path / "other", gated | {"token": False}, gated | {"token": "hf two"}, HF_TOKEN="hf_secret"
    )
    assert refused[0]["error"].startswith("org/gated is gated")
    assert "holds what no token has" in refused[1]["error"]
    assert "hf two" not in refused[1]["error"]
    assert sent(hub) == {None}
    none = loads(hub, tmp_path / "third", gated | {"token": True})
    assert none[0]["error"].startswith("token=True asks for the stored token, and there is none")


def test_files_are_fetched_again_where_that_is_asked_for(hub: HubServer, tmp_path: Path) -> None:
    loads(hub, tmp_path, {})
    hub.requests.clear()
    loads(hub, tmp_path, {})
    assert not hub.fetched
    loads(hub, tmp_path, {"force_download": True})
    assert {"config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= hub.fetched


def test_a_config_alone_is_one_file(hub: HubServer, tmp_path: Path) -> None:
    only: dict[str, Any] = {"config only": True}
    found = loads(
        hub, tmp_path, only | {"subfolder": "deep/inner"}, only | {"revision": "v1"}, only | {"revision": "v9"}
    )
    assert [one.get("eps") for one in found] == [EPS, 1e-5, None]
    assert hub.fetched == {"config.json"}
    only["local_files_only"] = True
    offline = loads(hub, tmp_path, only | {"revision": "v1"}, only | {"revision": "v9"})
    assert offline[0]["eps"] == 1e-5
    assert "local_files_only forbids" in offline[1]["error"]


def test_a_config_of_another_repo_is_taken(hub: HubServer, tmp_path: Path) -> None:
    options = {"config": "org/tiny", "subfolder": "deep/inner"}
    assert loads(hub, tmp_path, options)[0]["eps"] == EPS
