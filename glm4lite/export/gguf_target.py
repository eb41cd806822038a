"""GGUF: one file with weights, tokenizer, template and stop ids, for llama.cpp and what is built on it.

The package gguf writes the header; where each tensor lies is read back from it, and the blocks are written there row by
row. 4-bit files have k, v, the embedding and the head in Q8_0, as glm4lite's own int4 has them in int8. Source: ggml's
ggml-quants.c (the blocks), llama.cpp's conversion/glm.py and chatglm.py (what the metadata says).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError, shown
from glm4lite.base.extras import require
from glm4lite.base.whole_file import replace
from glm4lite.checkpoint.load_plan import Fill
from glm4lite.checkpoint.prepare import Prepared
from glm4lite.checkpoint.quantize import destination_folder
from glm4lite.checkpoint.writer import FolderWriter, Place, PlannedTensor, sync
from glm4lite.export import gguf_metadata
from glm4lite.gguf.header import SUFFIX, read_headers
from glm4lite.gguf.model import ggml_name
from glm4lite.model.causal_lm import CausalLM
from glm4lite_quant import QuantConfig
from glm4lite_quant.format import Codes
from glm4lite_quant.grids import Grid

KINDS: Mapping[str, tuple[int | None, int]] = {"q4_0": (4, 2), "q4_1": (4, 3), "q8_0": (8, 7), "bf16": (None, 32)}
"""Name -> bits of its codes, and llama.cpp's number of such a file."""

_GRIDS = {
    "Q4_0": Grid("middle", torch.float16),
    "Q4_1": Grid("minimum", torch.float16),
    "Q8_0": Grid("bytes", torch.float16),
}
_BLOCK = 32  # weights of each of these types' blocks
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


class GgufTarget:
    """kind: the type of most weights, one of `KINDS`."""

    def __init__(self, kind: str, method: str) -> None:
        if kind.lower() not in KINDS:
            raise ConfigError(f"the GGUF type is {shown(kind)}; use {', '.join(KINDS)}")
        require("an export to GGUF", "gguf")
        self.kind = kind.lower()
        bits, _ = KINDS[self.kind]
        self.quant = None if bits is None else QuantConfig(bits, _BLOCK, method=method)

    def destination(self, path: str | Path) -> Path:
        target = Path(path)
        if target.suffix != SUFFIX:
            raise ConfigError(f"{target} is to be a GGUF file; give a name that ends in {SUFFIX}")
        if os.path.lexists(target.expanduser()):
            raise CheckpointError(f"{target} exists; choose another name or remove it first")
        return destination_folder(target)

    def check(self, prepared: Prepared[Any]) -> None:
        if not isinstance(prepared.model, CausalLM):
            raise ConfigError(f"{type(prepared.model).__name__} has no form in GGUF; export a causal language model")
        gguf_metadata.check(prepared)

    def grid(self, fill: Fill) -> Grid | None:
        return _GRIDS.get(self._type(fill))

    def _type(self, fill: Fill) -> str:
        if len(fill.shape) == 1:
            return "F32"
        if not isinstance(fill.quant, QuantConfig):
            return "BF16"
        return "Q8_0" if fill.quant.bits == 8 else self.kind.upper()

    def planned(self, fill: Fill) -> list[PlannedTensor]:
        kind = self._type(fill)
        if kind not in _GRIDS:
            return [PlannedTensor(fill.source, torch.float32 if kind == "F32" else torch.bfloat16, fill.shape)]
        rows, columns = fill.shape
        return [PlannedTensor(fill.source, torch.uint8, (rows, columns // _BLOCK * _BYTES[kind]))]

    def encoded(self, fill: Fill, rows: Tensor | Codes) -> Mapping[str, Tensor]:
        if not isinstance(rows, Codes):
            return {fill.source: rows.to(torch.float32 if len(fill.shape) == 1 else torch.bfloat16)}
        return {fill.source: blocks_of(self._type(fill), rows)}

    def writer(self, path: Path, planned: list[PlannedTensor], prepared: Prepared[Any]) -> FolderWriter:
        types = {fill.source: self._type(fill) for fill in prepared.plan.fills}
        architecture, add = gguf_metadata.describe(prepared, KINDS[self.kind][1])
        return GgufWriter(path, planned, types, architecture, add)

    def finish(self, writer: FolderWriter, prepared: Prepared[Any]) -> None:
        """All of it is in the header."""


class GgufWriter(FolderWriter):
    """A `FolderWriter` whose result is one file.

    types: of each planned tensor, ggml's name. add: puts the metadata into a `gguf.GGUFWriter`.
    """

    def __init__(
        self,
        destination: Path,
        planned: list[PlannedTensor],
        types: Mapping[str, str],
        architecture: str,
        add: Callable[[Any], None],
    ) -> None:
        super().__init__(destination, planned)
        self._planned, self._types, self._architecture, self._add = planned, types, architecture, add

    def _begin(self) -> None:
        gguf = importlib.import_module("gguf")
        path = self._folder / self.destination.name
        header = gguf.GGUFWriter(path, self._architecture)
        self._add(header)
        for tensor in self._planned:
            kind, stored = gguf.GGMLQuantizationType[self._types[tensor.name]], torch.uint8
            shape = (*tensor.shape[:-1], tensor.shape[-1] * tensor.dtype.itemsize)
            header.add_tensor_info(ggml_name(tensor.name), shape, _numpy(stored), tensor.nbytes, kind)
        try:
            header.write_header_to_file()
            header.write_kv_data_to_file()
            header.write_ti_data_to_file()
        finally:
            header.close()
        end = path.stat().st_size
        whole = -(-end // _BLOCK) * _BLOCK + sum(-(-tensor.nbytes // _BLOCK) * _BLOCK for tensor in self._planned)
        os.truncate(path, whole)
        places = read_headers(path).tensors
        for tensor in self._planned:
            self._places[tensor.name] = Place(path.name, places[ggml_name(tensor.name)].offset, tensor)

    def _finish(self) -> None:
        self._check_whole()
        path = self._folder / self.destination.name
        sync(path)
        replace(path, self.destination)
        self._partial.discard()
        sync(self.destination.parent)


def blocks_of(kind: str, codes: Codes) -> Tensor:
    """Codes in groups of 32 as blocks of a type, uint8 [R, bytes]."""
    values = codes.values.unflatten(1, (-1, _BLOCK))
    if kind == "Q8_0":
        body = values ^ 128
    else:
        low, high = values.unflatten(2, (2, _BLOCK // 2)).unbind(2)
        body = low | (high << 4)
    halves = [codes.step, -codes.low] if kind == "Q4_1" else [codes.step]
    heads = [plane.to(torch.float16)[..., None].view(torch.uint8) for plane in halves]
    return torch.cat((*heads, body), -1).flatten(1)


def _numpy(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype
