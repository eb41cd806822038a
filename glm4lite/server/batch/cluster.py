"""A batch's requests answered by the workers of a Ray cluster, each with a model of its own or asking one server.

Ray Data hands requests to a pool of actors (https://docs.ray.io/en/latest/data/batch_inference.html). It starts an
actor that died anew, on another machine where its own is gone, and has what it was at computed again; the answers that
arrived stay. This process alone reads the requests and writes the answers.

Ray's own `HttpRequestProcessorConfig` is not used for servers: its stage asks one request of a batch after the other,
drops the status, and an answer that is no JSON ends the run.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from glm4lite import __version__
from glm4lite.base.errors import ConfigError, Glm4liteError, one_line, said_by, shown
from glm4lite.base.extras import require
from glm4lite.server.batch.lines import LineError, Request, Result
from glm4lite.server.batch.local import Model
from glm4lite.server.batch.running import Answerer, Source
from glm4lite_quant import host

LOCAL = "local"
CONNECT_S = 5.0
SILENCE_S = 3 * 3600.0  # without any answer, after which a run ends: every worker's machine is gone, say
FEW = 2000  # requests that travel one by one; of more, some together, so that the driver has not too many to mind
STORE = 512 << 20  # bytes of a local cluster's object store, which writes to the disk beyond
_SETTINGS = 4  # the kind of frame that HTTP/2, gRPC's ground, begins with (RFC 9113, 3.4 and 4.1)
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0))
_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}")


class ClusterError(Glm4liteError):
    """A Ray cluster cannot be used, or one of its workers cannot answer."""


@dataclass(frozen=True)
class Cluster:
    """Which cluster: "local" (one for this run, on this machine), "auto", or the address of its head, and how many
    workers; None: one for each of its GPUs, or for each machine. ConfigError for what is no address.
    """

    address: str
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.address.startswith("ray://"):
            raise ConfigError("--ray takes no ray:// address; run this on a machine of the cluster, with --ray auto")
        if self.address not in (LOCAL, "auto") and not _ADDRESS.fullmatch(self.address):
            raise ConfigError(
                f"--ray is {shown(self.address)}; use local, auto, or the head's address, such as head:6379"
            )
        require("--ray", "ray", "pyarrow", extra="ray")

    def results(
        self, source: Source, asked: Iterable[Request | LineError], say: Callable[[str], None]
    ) -> Generator[Result]:
        """The answers, as they complete; all requests are read first. `say` gets remarks for people.

        Raises:
            ClusterError: the cluster cannot be reached or is too small, or a worker cannot load the model.
        """
        rows, waiting = list[str](), set[str]()
        for request in asked:
            if isinstance(request, LineError):
                yield Result.unread(request)
            else:
                rows.append(json.dumps(request.fields))
                waiting.add(request.custom_id)
        if not rows:
            return
        with self._connected(source) as ray:
            pool = _Pool.of(ray, self, source)
            say(f"(workers of {self.address}: {pool.workers})")
            with closing(_answers(ray, pool, source, rows)) as answers:
                seen = set[str]()
                for answer in answers:
                    if (failure := answer.get("failure")) is not None:
                        raise ClusterError(f"a worker on {answer['host']} cannot answer: {failure}")
                    if answer["worker"] not in seen and len(seen) >= pool.workers:
                        say("(a worker ended and was started anew; what it was at is answered again)")
                    seen.add(answer["worker"])
                    result = Result(answer["line"], tuple(answer["ignored"]))
                    if result.line["custom_id"] in waiting:
                        waiting.discard(result.line["custom_id"])
                        yield result
        if waiting:
            raise ClusterError(f"{len(waiting):,} requests got no answer; the same command asks them again")

    @contextmanager
    def _connected(self, source: Source) -> Iterator[Any]:
        """Ray's module, connected. It reports nothing to its makers, and what it says is in its own logs alone."""
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DATA_LOG_LEVEL="CRITICAL")
        with ExitStack() as stack:
            stack.enter_context(_without_messages_of_c())
            if self.address == LOCAL:
                where = stack.enter_context(_private_folder())
                # Ray's ports listen on all addresses, and who reaches them runs code; so there is a secret.
                os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
                cpus = max(len(host.processors()), (self.workers or 1) * _cpus(source))
                asked: dict[str, Any] = {"num_cpus": cpus, "object_store_memory": STORE, "_temp_dir": where}
                asked |= {"address": LOCAL, "include_dashboard": False}
            else:
                if self.address != "auto":
                    _knock(self.address)
                asked = {"address": self.address}
            handler = signal.getsignal(signal.SIGTERM)
            import ray
            import ray.data

            stack.callback(ray.shutdown)
            try:
                ray.init(**asked, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:
                raise ClusterError(f"no Ray cluster can be used at {self.address}: {_told(error)}") from None
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)  # Ray has put one of its own there
            # A module's own flag, behind which Ray prints what befell its processes.
            ray._private.worker._worker_logs_enabled = False
            yield ray


@dataclass(frozen=True)
class _Pool:
    """The actors: how many, on one machine at most, and what each takes of it."""

    workers: int
    together: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, ray: Any, cluster: Cluster, source: Source) -> _Pool:
        """ClusterError where the cluster is too small for it."""
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        there = {name: int(sum(one.get(name, 0) for one in machines)) for name in ("CPU", "GPU")}
        device = source.device if isinstance(source, Model) else "cpu"
        wants_gpu = device.startswith("cuda") or (device == "auto" and there["GPU"] >= (cluster.workers or 1))
        workers = cluster.workers or (there["GPU"] if wants_gpu else len(machines)) or 1
        cpus, gpus = _cpus(source), int(wants_gpu)
        for name, each in (("CPU", cpus), ("GPU", gpus)):
            if workers * each > there[name]:
                wanted = f"{workers} workers take {workers * each} {name}s"
                raise ClusterError(f"{wanted}, and the cluster has {there[name]}; take fewer --workers")
        return cls(workers, -(-workers // len(machines)), cpus, gpus)


class Worker:
    """An actor of the pool. What it cannot do it says in its answers: an error in `__init__` would be Ray's.

    together: workers that share the processors of this machine.
    """

    def __init__(self, source: Source, together: int, version: str) -> None:
        self._failure: str | None = None
        try:
            if version != __version__:
                raise ClusterError(f"it has glm4lite {__version__}, and this run is of {version}; install that there")
            if isinstance(source, Model) and source.threads is None and together > 1:
                source = replace(source, threads=max(1, len(host.processors()) // together))
            self._answerer: Answerer = source.open()
        except Exception as error:
            self._failure = str(said_by(error))

    def __call__(self, table: Any) -> Any:
        """A table of requests as a table of answers, row by row; other calls run beside it."""
        found = [json.dumps(self._answered(json.loads(text))) for text in table["request"].to_pylist()]
        return type(table).from_pydict({"answer": found})

    def _answered(self, fields: dict[str, Any]) -> dict[str, Any]:
        name = socket.gethostname()
        if self._failure is None:
            done: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
            try:
                self._answerer.begin(Request(fields["custom_id"], fields), done.put, threading.Event())
                ended = done.get()
            except Exception as error:
                ended = error
            if isinstance(ended, Result):
                worker = f"{name} {os.getpid()}"
                return {"worker": worker, "line": ended.line, "ignored": ended.ignored}
            self._failure = str(said_by(ended))
        return {"failure": self._failure, "host": name}


def _answers(ray: Any, pool: _Pool, source: Source, rows: list[str]) -> Generator[dict[str, Any]]:
    """What the workers say, as they say it."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = SILENCE_S
    blocks = len(rows) if len(rows) <= FEW else max(FEW, -(-len(rows) // 16))
    answers = ray.data.from_items([{"request": row} for row in rows], override_num_blocks=blocks).map_batches(
        Worker,
        fn_constructor_args=(source, pool.together, __version__),
        compute=ray.data.ActorPoolStrategy(
            size=pool.workers,
            max_tasks_in_flight_per_actor=source.at_once,
            max_concurrent_calls_per_actor=source.at_once,
            enable_true_multi_threading=True,
        ),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    try:
        for table in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(json.loads, table["answer"].to_pylist())
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "ray":
            raise
        raise ClusterError(f"Ray gave up: {_told(error)}") from None


def _cpus(source: Source) -> int:
    """Processors that a worker is counted with, so that Ray spreads them; with no --threads it takes what is there."""
    return (source.threads or 1) if isinstance(source, Model) else 1


@contextmanager
def _private_folder() -> Iterator[str]:
    """Ray opens its folder to all users, and its sockets have short names; so it gets one inside of a closed one."""
    outside = tempfile.mkdtemp(prefix="glm", dir="/tmp" if sys.platform != "win32" else None)
    try:
        yield os.path.join(outside, "r")
    finally:
        shutil.rmtree(outside, ignore_errors=True)


@contextmanager
def _without_messages_of_c() -> Iterator[None]:
    """Ray's core writes to descriptor 2, whatever it is told; the command line writes to a copy of it.

    Where nobody made a copy, the program's own words would go, too, so all are left.
    """
    if sys.stderr is sys.__stderr__:
        yield
        return
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _knock(address: str) -> None:
    """Ray tries an address for minutes at which nobody listens, or a server of something else than gRPC."""
    name, _, port = address.rpartition(":")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), CONNECT_S) as connection:
            connection.settimeout(CONNECT_S)
            if os.environ.get("RAY_USE_TLS", "0") != "0":  # which begins otherwise
                return
            connection.sendall(_HELLO)
            said = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address} ({one_line(error)})") from None
    if len(said) < 4 or said[3] != _SETTINGS:
        raise ClusterError(
            f"what answers at {address} is no Ray cluster; give the address that `ray start --head` says"
        )


def _told(error: Exception) -> str:
    """The last line of what Ray says: its errors hold a traceback."""
    said = [line for line in str(error).splitlines() if line.strip()]
    return one_line(said[-1] if said else type(error).__name__, 300)
