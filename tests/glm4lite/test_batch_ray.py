"""`glm4lite batch --ray`: a real cluster of two machines (raylets here), of which a worker and a machine are killed.

Ray is in no extra that the tests install: what needs it skips without it, and is slow with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from glm4lite import __version__
from glm4lite.base import extras
from glm4lite.base.errors import ConfigError
from glm4lite.base.extras import MissingPackageError
from glm4lite.engine import engine
from glm4lite.engine.engine import Engine
from glm4lite.server.batch import cluster
from glm4lite.server.batch.client import Server
from glm4lite.server.batch.cluster import Cluster, ClusterError, Worker
from glm4lite.server.batch.lines import LineError, Request
from glm4lite.server.batch.local import Model
from glm4lite_quant import host
from glm4lite_quant.kernels import native
from tests.commands import FRESH, run
from tests.glm4lite.served import served, wait_for
from tests.glm4lite.test_batch import asked, by_id, chat, completion, many, read, write

NANO = Model("nano", "nano", parallel=2)


class Column(list[str]):
    def to_pylist(self) -> list[str]:
        return list(self)


class Table(dict[str, Column]):
    """As much of pyarrow's as a worker uses."""

    @classmethod
    def from_pydict(cls, columns: dict[str, list[str]]) -> Table:
        return cls({name: Column(values) for name, values in columns.items()})


def told(worker: Worker, *requests: Any) -> list[Any]:
    table = worker(Table.from_pydict({"request": [json.dumps(request) for request in requests]}))
    return [json.loads(text) for text in table["answer"]]


@dataclass
class Machines:
    """Ray's module, of which the machines are looked at; they have these processors and GPUs."""

    of: list[tuple[int, int]]

    def nodes(self) -> list[dict[str, Any]]:
        there = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in self.of]
        return [*there, {"Alive": False, "Resources": {"CPU": 99.0}}, {"Alive": True, "Resources": {}}]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what looks whether Ray is there, and does not use it."""
    monkeypatch.setattr(cluster, "require", lambda *_, **__: None)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_installed", lambda name: name != "ray")
    with pytest.raises(MissingPackageError, match=r"^--ray needs ray: pip install 'glm4lite\[ray\]'$"):
        Cluster("local")


@pytest.mark.parametrize(
    "address", ["", "head", "head:", "ray://head:10001", "http://head:6379", "head:6379/x", "a\n:1"]
)
def test_what_is_no_address_is_refused(address: str, installed: None) -> None:
    with pytest.raises(ConfigError, match="--ray "):
        Cluster(address)


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_what_answers_at_an_address_and_is_no_cluster_is_said(says: bytes | None, installed: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"

        def answer() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(says or b"")

        if says is None:
            listening.close()
        else:
            threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ClusterError, match="no Ray cluster") as error:
            next(Cluster(address).results(NANO, [request("a")], lambda _: None))
        assert "\n" not in str(error.value)


def request(name: str) -> Any:
    return Request(name, asked(name, chat()))


def test_where_no_request_is_left_no_cluster_is_asked(installed: None) -> None:
    found = list(Cluster("nowhere:1").results(NANO, [LineError(3, "invalid_json_line", "it is none")], lambda _: None))
    assert [one.line["error"]["line"] for one in found] == [3]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("machines", "workers", "device", "threads", "expected"),
    [  # workers, those of one machine, processors and GPUs that each is counted with
        ([(8, 0), (8, 0)], None, "auto", None, (2, 1, 1, 0)),
        ([(8, 0), (8, 0)], 4, "auto", None, (4, 2, 1, 0)),
        ([(8, 0), (4, 0)], 3, "auto", None, (3, 2, 1, 0)),
        ([(8, 0), (8, 0)], 4, "auto", 3, (4, 2, 3, 0)),
        ([(32, 4), (32, 4)], None, "auto", None, (8, 4, 1, 1)),
        ([(32, 4), (32, 4)], 2, "cuda", None, (2, 1, 1, 1)),
        ([(32, 4), (32, 4)], None, "cpu", None, (2, 1, 1, 0)),
    ],
)
def test_workers_are_spread_over_what_there_is(
    machines: list[tuple[int, int]],
    workers: int | None,
    device: str,
    threads: int | None,
    expected: Any,
) -> None:
    source = Model("nano", "nano", device=device, threads=threads)
    pool = cluster._Pool.of(Machines(machines), Cluster("head:1", workers), source)
    assert (pool.workers, pool.together, pool.cpus, pool.gpus) == expected


def test_a_cluster_that_is_too_small_says_what_it_has(installed: None) -> None:
    with pytest.raises(ClusterError, match=r"^3 workers take 6 CPUs, and the cluster has 4; take fewer --workers$"):
        cluster._Pool.of(Machines([(4, 0)]), Cluster("head:1", 3), Model("nano", "nano", threads=2))
    with pytest.raises(ClusterError, match=r"^5 workers take 5 GPUs, and the cluster has 4"):
        cluster._Pool.of(Machines([(64, 4)]), Cluster("head:1", 5), Model("nano", "nano", device="cuda"))
    assert cluster._Pool.of(Machines([(2, 1)]), Cluster("head:1", 2), Server("http://a")).gpus == 0


def test_a_worker_answers_and_says_what_it_cannot() -> None:
    worker = Worker(NANO, 1, __version__)
    good, bad = told(worker, asked("a", chat()), asked("b", chat(temperature=9), "/v1/completions"))
    assert (good["line"]["custom_id"], good["line"]["response"]["status_code"]) == ("a", 200)
    assert bad["line"]["response"]["status_code"] == 400
    assert good["worker"] == bad["worker"] == f"{socket.gethostname()} {os.getpid()}"
    worker._answerer.close()
    for broken, why in (
        (Worker(Model("/no/such/folder", "folder"), 1, __version__), "/no/such/folder does not exist"),
        (Worker(NANO, 1, "0.0.1"), f"it has glm4lite {__version__}, and this run is of 0.0.1"),
        (Worker(Server("http://127.0.0.1:1"), 1, __version__), "no server answers at http://127.0.0.1:1"),
    ):
        [answer] = told(broken, asked("a", chat()))
        assert answer["host"] == socket.gethostname()
        assert why in answer["failure"]
        assert "\n" not in answer["failure"]


def test_workers_of_one_machine_share_it_and_let_wait_what_they_do_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.thread_count()
    monkeypatch.setattr(engine, "_usual_parallel", lambda _: 1)  # as where layers lie on a GPU
    worker = Worker(Model("nano", "nano"), 2, __version__)
    try:
        assert native.thread_count() == max(1, len(host.processors()) // 2)
        requests = many(Model("nano", "nano").at_once, 5)
        with ThreadPoolExecutor(len(requests)) as calls:  # as Ray makes them
            answers = [answer for [answer] in calls.map(lambda one: told(worker, one), requests)]
        assert [answer["line"]["response"]["status_code"] for answer in answers] == [200] * len(requests)
    finally:
        worker._answerer.close()
        native.set_threads(before)


@dataclass
class Head:
    """A cluster: its address, what its users have in their environment, and the process of its second machine."""

    address: str
    environment: dict[str, str]
    second: subprocess.Popen[bytes]

    def batch(self, source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        command = [*FRESH, "batch", str(source), str(out), "--ray", self.address, *more]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=280, check=False)

    def begun(self, source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
        command = [*FRESH, "batch", str(source), str(out), "--ray", self.address, *more]
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Two machines of a processor each (two, of the first, so that one may go), as `ray start` makes them."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'glm4lite[ray]'")
    folder = tempfile.mkdtemp(prefix="glm", dir="/tmp")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {**os.environ, **secret}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=100000000"]
    begin = [*start, "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=2", f"--temp-dir={folder}/r"]
    join = [*start, f"--address=127.0.0.1:{port}", "--num-cpus=1"]
    quiet: Any = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        first = subprocess.Popen(begin, start_new_session=True, **quiet)
        stack.callback(end, first)
        wait_for(lambda: listens(port), 90)
        second = subprocess.Popen(join, start_new_session=True, **quiet)
        stack.callback(end, second)
        wait_for(lambda: any("raylet" in name for name in names(second)), 90)
        yield Head(f"127.0.0.1:{port}", environment, second)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def names(process: subprocess.Popen[bytes]) -> list[str]:
    return [one.name() for one in family(process)]


def end(process: subprocess.Popen[bytes]) -> None:
    for one in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(20)


def workers() -> list[psutil.Process]:
    """The actors of this test's cluster; Ray names their processes."""
    return [one for one in psutil.process_iter(["cmdline"]) if "ray::MapWorker" in " ".join(one.info["cmdline"] or ())]


def lines_of(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A file of requests, two lines of it none, and what the model in one process answers."""
    folder = tmp_path_factory.mktemp("job")
    source = write(folder / "in.jsonl", [*many(150, 60), asked(7, chat()), asked("bad", completion("a", -1))])
    assert run("batch", source, folder / "here.jsonl").returncode == 3
    return source, by_id(read(folder / "here.jsonl"))


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_but_time(head: Head, job: Any, tmp_path: Path) -> None:
    source, expected = job
    out = tmp_path / "out.jsonl"
    with head.begun(source, out, "--workers", "2") as command:
        wait_for(lambda: lines_of(out) >= 10, 200)
        workers()[0].kill()
        _, errors = command.communicate(timeout=280)
    assert command.returncode == 3, errors
    assert by_id(read(out)) == expected
    assert "a worker ended and was started anew" in errors
    ours = ("(", "nano is", "error: ")
    assert [line for line in errors.splitlines() if not line.startswith(ours) and "requests done" not in line] == []


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_and_so_does_one_that_is_interrupted(
    head: Head, job: Any, tmp_path: Path
) -> None:
    source, expected = job
    out = tmp_path / "out.jsonl"
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = lines_of(out)
        with head.begun(source, out, "--workers", "2") as command:
            wait_for(lambda before=before: lines_of(out) >= before + 10, 200)  # type: ignore[misc]
            command.send_signal(number)
            _, errors = command.communicate(timeout=100)
        assert command.returncode == code, errors
        assert lines_of(out) < 152
    assert "the same command goes on from here" in errors.splitlines()[-1]
    wait_for(lambda: not workers(), 60)  # none goes on for a command that is gone
    done = head.batch(source, out, "--workers", "2")
    assert done.returncode == 3, done.stderr
    assert by_id(read(out)) == expected


@pytest.mark.slow
def test_what_a_cluster_cannot_do_is_one_line(head: Head, job: Any, tmp_path: Path) -> None:
    source, _ = job
    out = tmp_path / "out.jsonl"
    without = {**head.environment, "RAY_AUTH_TOKEN": "0" * 64}
    for environment, more, why in (
        (head.environment, ("--workers", "1", "--model", "/no/such/folder"), "cannot answer: /no/such/folder does not"),
        (head.environment, ("--workers", "9"), "9 workers take 9 CPUs, and the cluster has 3"),
        (without, ("--workers", "1"), "no Ray cluster can be used at"),
    ):
        done = Head(head.address, environment, head.second).batch(source, out, *more)
        assert done.returncode == 2, done.stderr
        assert why in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_workers_may_ask_a_server(head: Head, job: Any, tmp_path: Path) -> None:
    source, expected = job
    out = tmp_path / "out.jsonl"
    with served(Engine.load("nano", device="cpu"), queue_size=64) as server:
        done = head.batch(source, out, "--workers", "2", "--server", server.url, "--parallel", "3")
    assert done.returncode == 3, done.stderr
    assert by_id(read(out)) == expected


@pytest.mark.slow
def test_a_machine_that_is_lost_costs_nothing_but_time(head: Head, job: Any, tmp_path: Path) -> None:
    """The last test of the cluster, which has one machine afterwards."""
    source, expected = job
    out = tmp_path / "out.jsonl"
    with head.begun(source, out, "--workers", "2") as command:
        wait_for(lambda: lines_of(out) >= 10, 200)
        assert set(map(psutil.Process, (one.pid for one in workers()))) & set(family(head.second))
        end(head.second)
        _, errors = command.communicate(timeout=280)
    assert command.returncode == 3, errors
    assert by_id(read(out)) == expected


@pytest.mark.slow
def test_a_cluster_of_ones_own_is_closed_to_others_and_leaves_nothing(job: Any, tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'glm4lite[ray]'")
    source, expected = job
    out, before = tmp_path / "out.jsonl", set(Path("/tmp").glob("glm????????"))
    command = [*FRESH, "batch", str(source), str(out), "--ray", "local", "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: lines_of(out) >= 10, 200)
        [folder] = set(Path("/tmp").glob("glm????????")) - before
        assert folder.stat().st_mode & 0o077 == 0
        of_ray = [one for one in psutil.Process(process.pid).children(recursive=True) if "gcs" in one.name()]
        assert all(one.environ()["RAY_AUTH_MODE"] == "token" for one in of_ray)
        assert all(one.environ()["RAY_USAGE_STATS_ENABLED"] == "0" for one in of_ray)
        assert of_ray
        _, errors = process.communicate(timeout=280)
    assert process.returncode == 3, errors
    assert by_id(read(out)) == expected
    assert not folder.exists()
