"""What an export costs: `python -m bench.exports FOLDER [OUT]`, FOLDER from `bench.make_checkpoint --layers N`.

Prints for each format the seconds of the clock and of the processor, the size, and the most anonymous memory (of Linux'
/proc) that the exporting process took above what it had begun with. What is written is removed again.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm4lite.export.export import export_checkpoint

FORMATS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "hf": ("hf", {}),
    "compressed-tensors, 32": ("compressed-tensors", {}),
    "compressed-tensors, 128": ("compressed-tensors", {"group_size": 128}),
    "compressed-tensors, 32, not calibrated": ("compressed-tensors", {"calibrate": False}),
    "q4_0": ("gguf", {"kind": "q4_0"}),
    "q4_1": ("gguf", {"kind": "q4_1"}),
    "q8_0": ("gguf", {"kind": "q8_0"}),
}


def anonymous() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def highest(work: Callable[[], object]) -> int:
    """The most anonymous memory while it ran, above that before."""
    before, most, ended = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return most - before


def main() -> None:
    source = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as place:
        for name, (to, settings) in FORMATS.items():
            out = Path(place) / ("out.gguf" if to == "gguf" else "out")
            clock, processor = time.perf_counter(), time.process_time()
            memory = highest(lambda out=out, to=to, settings=settings: export_checkpoint(source, out, to, **settings))  # type: ignore[misc]
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
            print(f"{name:40} {clock:6.1f} s, {processor:6.1f} s CPU, {size / 1e9:5.2f} GB, {memory / 2**30:.2f} GiB")
            shutil.rmtree(out) if out.is_dir() else out.unlink()


if __name__ == "__main__":
    main()
