"""One file of requests answered by one process, by a server, and by workers of Ray on the same machine.

    python -m bench.batches                          # nano; needs pip install 'glm4lite[ray]'
    python -m bench.batches --model FOLDER --rows 50

Rows a second are counted from the first answer to the last, so that starting (said apart) is not in them; memory is the
unique and shared parts (PSS) of all processes together, at their most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LOOK_S = 5.0  # between two looks at the memory, each of which takes tenths of a second
GLM4LITE = [sys.executable, "-m", "glm4lite"]


def write_requests(path: Path, model: str, rows: int, tokens: int) -> None:
    with path.open("w") as file:
        for number in range(rows):
            body = {"model": model, "prompt": f"{number} " * (number % 7 + 1), "temperature": 0, "max_tokens": tokens}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def memory(process: psutil.Process) -> int:
    """Bytes of a process and all that it started."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measured(command: list[str], out: Path, rows: int) -> tuple[float, float, int]:
    """Seconds to the first answer, rows a second from there on, and the most memory."""
    began, first, begun, most, looked = time.monotonic(), 0.0, 0, 0, 0.0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        process = psutil.Process(running.pid)
        while (done := out.read_bytes().count(b"\n") if out.exists() else 0) < rows and running.poll() is None:
            if done and not first:
                first, begun = time.monotonic(), done
            if time.monotonic() > looked + LOOK_S:
                most, looked = max(most, memory(process)), time.monotonic()
            time.sleep(0.05)
        last = time.monotonic()
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}")
    return first - began, (rows - begun) / (last - first), most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        write_requests(source, Path(given.model).name, given.rows, given.tokens)
        print(f"{'':<28}{'first answer':>14}{'rows/s':>9}{'memory':>11}")
        for number, more in enumerate(([], ["--ray", "local", "--workers", "1"], ["--ray", "local", "--workers", "2"])):
            out = Path(folder) / f"{number}.jsonl"
            command = [*GLM4LITE, "batch", str(source), str(out), "--model", given.model, *more]
            start, rate, most = measured(command, out, given.rows)
            print(f"{' '.join(more) or 'one process':<28}{start:>12.1f} s{rate:>9.1f}{most / 2**30:>8.2f} GiB")


if __name__ == "__main__":
    main()
