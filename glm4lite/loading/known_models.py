"""The known models beside this machine: how large each is, and how it would run here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from glm4lite.base.sizes import readable
from glm4lite.hub.known import KNOWN, Known
from glm4lite.loading.requirements import imagined, requirements_of
from glm4lite.memory.budget import Budget, place_within
from glm4lite.memory.machine import free_gpus, free_ram
from glm4lite.memory.resources import Machine, Placement, Requirements


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name. Bytes to download, and in int4; where its int4 layers would lie on this machine."""

    name: str
    repo_id: str
    about: str
    download_bytes: int
    int4_bytes: int
    fits: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def row(self) -> tuple[str, ...]:
        return self.name, self.repo_id, readable(self.download_bytes), readable(self.int4_bytes), self.fits, self.about


HEADER = ("name", "repository", "download", "int4", "fits", "what it does")


def known_models() -> Iterator[KnownModel]:
    """All of them, by the shapes that are known; neither the network nor the disk is asked."""
    gpus = free_gpus(True, lambda _: None) if torch.cuda.is_available() else ()
    machine = Machine(free_ram(), gpus)  # speeds are not measured: they do not decide what fits
    of_shape: dict[str, tuple[int, Requirements]] = {}
    for one in KNOWN:
        shape = repr(one.config)
        if shape not in of_shape:
            checkpoint = imagined(Path(one.name), dict(one.config))
            stored = sum(checkpoint.nbytes(name) for name in checkpoint.names())
            needs = requirements_of(checkpoint, "int4")
            of_shape[shape] = stored, replace(needs, stored=True, loading=0)  # as `pull --quant` makes it
        stored, int4 = of_shape[shape]
        placement = place_within(int4, machine, Budget())
        yield KnownModel(one.name, one.repo_id, one.about, stored, int4.weight_bytes, _said(one, placement))


def _said(one: Known, placement: Placement) -> str:
    if not placement.fits:
        return "not in memory"
    gpu = sum(len(share.layers) for share in placement.devices if share.device not in ("cpu", "disk"))
    layers = one.config["num_hidden_layers"]
    if placement.share("disk").layers:
        return "from disk"
    return "in RAM" if not gpu else "on the GPU" if gpu == layers else f"{gpu} of {layers} layers on the GPU"
