"""What quantizing a model as it arrives costs beside quantizing the same files from a folder.

`python -m bench.pull [--layers 8] [--rounds 2] [--folder FOLDER]` writes a 9B of so many layers (2.4 GB, and 0.41 a
layer) in four shards, gives it out over loopback from a process of its own (HTTP/1.1, ranges, sendfile), and runs
`glm4lite quantize FOLDER` and `glm4lite pull` in turn. Prints seconds of the clock, of the processor, the highest use
of disk beside the folder, and the ratio. All that is written is removed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

from bench.make_checkpoint import make_config, write_checkpoint
from glm4lite.base.owned_folder import remove_tree
from glm4lite.base.sizes import readable
from glm4lite.hub.cache import size_of

REPO, COMMIT = "bench/nine", "0" * 40
SHARDS = 4
POLL_S = 0.2
SENT_AT_ONCE = 1 << 20


def served(folder: Path, told: Connection) -> None:
    """Gives a folder out as the Hub does, until the process is ended; tells its port."""
    files = {path.name: path for path in folder.iterdir()}
    entries = [_entry(path) for path in files.values()]
    listing = json.dumps({"sha": COMMIT, "siblings": entries}).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            place = urlsplit(self.path).path
            path = files.get(place.rpartition("/")[2])
            if place.startswith("/api/") or path is None:
                self._begin(200 if path is None and place.startswith("/api/") else 404, len(listing))
                self.wfile.write(listing)
                return
            size = path.stat().st_size
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(part[1]), min(int(part[2] or size), size - 1)) if part else (0, size - 1)
            span = {"Content-Range": f"bytes {first}-{last}/{size}"} if part else {}
            self._begin(206 if part else 200, last + 1 - first, span)
            with path.open("rb") as file:
                while first <= last:
                    count = min(SENT_AT_ONCE, last + 1 - first)
                    first += os.sendfile(self.connection.fileno(), file.fileno(), first, count)

        def _begin(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(length), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told.send(server.server_address[1])
    server.serve_forever()


def _entry(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"rfilename": path.name, "size": path.stat().st_size, "lfs": {"sha256": digest}}


@dataclass
class Run:
    """Seconds of the clock, of the processor in the program and in the system, and the highest use of disk."""

    clock: float
    user: float
    system: float
    disk: int


def run(arguments: list[str], environment: dict[str, str], written: Path) -> Run:
    """Runs glm4lite once, and removes what it wrote."""
    written.mkdir()
    began, disk = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "glm4lite", *arguments], env=os.environ | environment)
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        disk = max(disk, size_of(written))
        time.sleep(POLL_S)
    clock = time.monotonic() - began
    remove_tree(written)
    if status:
        sys.exit(f"glm4lite {' '.join(arguments)} failed")
    return Run(clock, usage.ru_utime, usage.ru_stime, disk)


def measure(folder: Path, rounds: int) -> None:
    written, source = folder / "written", folder / "source"
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=served, args=(source, theirs), daemon=True)
    server.start()
    address = f"http://127.0.0.1:{ours.recv()}"
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(written / "home"), "NO_PROXY": "127.0.0.1"}
    ways = {
        "from the folder": ["quantize", str(source), str(written / "int4")],
        "as it arrives": ["pull", REPO, "--quant", "int4", "--to", str(written / "int4")],
    }
    best: dict[str, float] = {}
    for _ in range(rounds):
        for way, arguments in ways.items():
            seen = run(arguments, environment, written)
            best[way] = min(best.get(way, seen.clock), seen.clock)
            times = f"{seen.clock:6.1f} s of the clock, {seen.user:6.1f} user, {seen.system:5.1f} system"
            print(f"{way:16} {times}, disk {readable(seen.disk)}")
    ratio = best["as it arrives"] / best["from the folder"]
    print(json.dumps({"seconds": best, "ratio": round(ratio, 3)}))
    server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        config = make_config("9b", given.layers)
        size = given.layers * 0.41e9 + 2.5e9
        write_checkpoint(Path(folder) / "source", config, shard_bytes=int(size / SHARDS))
        measure(Path(folder), given.rounds)


if __name__ == "__main__":
    main()
