"""The files that bench/peers.py compares: one checkpoint of random weights in every engine's own format.

Made in an order that needs the least disk, each deleted when nothing needs it any more; what was there before stays.
A file is written under another name first, so that half of one is never taken for a whole one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from bench.make_checkpoint import make_config, write_checkpoint
from glm4lite import Glm4ForCausalLM, Glm4liteError
from glm4lite.base.sizes import readable

# Size over the bfloat16 bytes: of the embedding and the head, of all else. A little more than measured.
SIZES = {
    "bf16": (1.01, 1.01),
    "int4": (0.53, 0.29),
    "int8": (0.53, 0.53),
    "gguf": (1.01, 1.01),
    "Q4_0": (0.42, 0.29),
    "Q4_K_M": (0.42, 0.34),
    "Q8_0": (0.54, 0.54),
}
GGUF = ("Q4_0", "Q4_K_M", "Q8_0")


class Files:
    """By kind: bf16, int4, int8 (folders), gguf (bfloat16), Q4_0, Q4_K_M, Q8_0; config holds only a config.json."""

    def __init__(self, folder: Path, shape: str, layers: int | None, wanted: Collection[str], threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.config = make_config(shape, layers)
        self._stem = shape if layers is None else f"{shape}-{layers}layers"
        self._wanted = [kind for kind in SIZES if kind in wanted and not self.path(kind).exists()]
        self.seconds: dict[str, float] = {}

    def path(self, kind: str) -> Path:
        if kind == "bf16":
            return self.folder / self._stem
        suffix = "-bf16.gguf" if kind == "gguf" else f"-{kind.lower()}{'.gguf' if kind in GGUF else ''}"
        return self.folder / f"{self._stem}{suffix}"

    def steps(self) -> Iterator[tuple[str, str]]:
        """("make" or "delete", kind), in order; only what is missing is made, only what was made is deleted."""
        ours = [kind for kind in ("int4", "int8") if kind in self._wanted]
        theirs = [kind for kind in GGUF if kind in self._wanted]
        convert = bool(theirs) and not self.path("gguf").exists()
        temporary = (bool(ours) or convert) and not self.path("bf16").exists()
        made = (["bf16"] if temporary else []) + ours + (["gguf"] if convert else [])
        yield from (("make", kind) for kind in made)
        if temporary:
            yield "delete", "bf16"
        yield from (("make", kind) for kind in theirs)
        if convert:
            yield "delete", "gguf"

    def needed(self) -> int:
        """Bytes of disk at the worst moment of the steps."""
        with torch.device("meta"):
            model = Glm4ForCausalLM(self.config)
        outer = 2 * 2 * model.lm_head.weight.numel()
        inner = 2 * sum(parameter.numel() for parameter in model.parameters()) - outer
        size = peak = 0
        for action, kind in self.steps():
            share = SIZES[kind]
            change = int(outer * share[0] + inner * share[1])
            size += change if action == "make" else -change
            peak = max(peak, size)
        return peak

    def check_disk(self) -> None:
        """Raises Glm4liteError where the folder's disk has not enough room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = self.needed(), shutil.disk_usage(self.folder).free
        if needed > free:
            raise Glm4liteError(
                f"{self.folder} needs {readable(needed)} of disk, {readable(free)} are free; "
                "give another folder with --work, or fewer layers with --layers"
            )

    def make(self) -> None:
        """Everything wanted; says on stderr what it does."""
        config = self.path("config")
        config.mkdir(exist_ok=True)
        (config / "config.json").write_text(json.dumps(self.config.to_diff_dict()), encoding="utf-8")
        for action, kind in list(self.steps()):  # what exists changes as they are taken
            if action == "delete":
                _delete(self.path(kind))
                continue
            sys.stderr.write(f"making {self.path(kind)}\n")
            started = time.perf_counter()
            self._make(kind)
            self.seconds[kind] = time.perf_counter() - started

    def _make(self, kind: str) -> None:
        target = self.path(kind)
        if kind == "bf16":
            write_checkpoint(target, self.config)
        elif kind in ("int4", "int8"):
            command = [sys.executable, "-m", "glm4lite", "quantize", str(self.path("bf16")), str(target)]
            subprocess.run([*command, "--quant", kind], check=True)
        else:
            from bench import llama

            partial = target.with_name(f"{target.name}.partial")
            if kind == "gguf":
                llama.write_gguf(self.path("bf16"), partial)
            else:
                llama.quantize(self.path("gguf"), partial, kind, self.threads)
            partial.rename(target)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
