"""One safetensors file: its header, checked before any byte of it is used, and reads of whole tensors or row ranges.

Why not `safetensors.safe_open`: its errors name neither the file nor the tensor, and its row slices touch a map of the
whole file. Reads here go through one buffer of the size asked for, and the kernel is told to forget the pages read, so
a load of N bytes never holds N bytes. Already quantized tensors are mapped instead (`mapped`), and never copied.

Format (https://github.com/huggingface/safetensors): u64 little-endian header size, JSON header, data without gaps.
Every number of a header is a stranger's: a shape that torch could not hold is refused before torch is asked.
"""

import math
import mmap
import os
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from glm4lite.base.errors import CheckpointError
from glm4lite.base.files import MAX_JSON_BYTES, open_file, parse_json
from glm4lite.base.magic import START_BYTES, dangling, mistaken_for
from glm4lite.base.stored_tensor import ITEM_BYTES, StoredTensor
from glm4lite_quant import pages

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "U32": torch.uint32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The element types that can be read, by their safetensors names."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_MAX_DIMENSIONS = 8
_MAX_NAME = 1000
_AGAIN = "download or copy the file again"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, checked: known types, sizes that match the shapes, no gap, no overlap.

    Raises:
        CheckpointError: the file is truncated, is not safetensors, or its header contradicts itself.
    """
    entries, data_start, file_size = _header_json(path)
    tensors = tensors_of(path, entries, data_start)
    spans = [
        (tensor.offset - data_start, tensor.offset - data_start + tensor.nbytes, name)
        for name, tensor in tensors.items()
    ]
    _check_spans(path, spans, file_size - data_start)
    return tensors


def tensors_of(path: Path, entries: Mapping[str, Any], data_start: int = 0) -> dict[str, StoredTensor]:
    """The tensors of a header's entries, each checked on its own; `path` may be of a file that is not here.

    Raises:
        CheckpointError: an entry is no description of a tensor, or contradicts itself.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, entry in entries.items():
        dtype, shape, begin, end = _entry_fields(path, name, entry)
        tensor = StoredTensor(name, dtype, shape, path, data_start + begin)
        if tensor.nbytes != end - begin:
            what = f"{name} is {dtype} {list(shape)}, {tensor.nbytes} bytes"
            raise _lies(path, f"{what}, but its offsets span {end - begin}")
        tensors[name] = tensor
    return tensors


def _header_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's entries, the position of the first data byte, and the file's size."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(START_BYTES)
            length = header_length(path, start)
            if 8 + length > size:
                raise _truncated(path, "header", 8 + length, size)
            text = start[8 : 8 + length] + file.read(max(0, 8 + length - len(start)))
    except OSError as error:
        raise CheckpointError(f"{path} {_unreadable(path, error)}") from None
    return header_entries(path, text), 8 + length, size


def header_length(path: Path, start: bytes) -> int:
    """Bytes of JSON that the first 8 announce, of a file which may be one that is not here.

    start: the first START_BYTES or more, as far as there are; what such a file is instead is named.
    """
    what = None if start[8:9] == b"{" else mistaken_for(start)
    if what is not None:
        raise CheckpointError(f"{path} is {what}")
    if len(start) < 8:
        raise CheckpointError(f"{path} is truncated: {len(start)} bytes are too few for safetensors; {_AGAIN}")
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is not a safetensors file: its header size reads {length}; {_AGAIN}")
    return length


def header_entries(path: Path, text: bytes) -> dict[str, Any]:
    """The tensors' entries of a header."""
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} has a corrupt header ({error}); {_AGAIN}") from None
    if not isinstance(entries, dict):
        raise _lies(path, "it is not a JSON object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _lies(path, "its __metadata__ is not an object of texts")
    return entries


def _unreadable(path: Path, error: OSError) -> str:
    link = dangling(path)
    return f"cannot be read: {error.strerror or error}" if link is None else f"is {link}"


def _entry_fields(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin, end of one entry, each of the right type."""
    if len(name) > _MAX_NAME or not name.isprintable():  # it is written in messages
        raise _lies(path, f"{reprlib.repr(name)} is no name of a tensor")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _lies(path, f"{name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{path}: {name} has the unknown type {reprlib.repr(dtype)}; known: {', '.join(sorted(ITEM_BYTES))}"
        )
    if not _naturals(shape):
        raise _lies(path, f"{name} has the shape {reprlib.repr(shape)}")
    if len(shape) > _MAX_DIMENSIONS:
        raise _lies(path, f"{name} has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}")
    if math.prod(max(size, 1) for size in shape) * ITEM_BYTES[dtype] >= 2**63:  # also where a 0 makes it empty
        raise _lies(path, f"{name} has the shape {shape}, which no tensor can have")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _lies(path, f"{name} has the offsets {reprlib.repr(offsets)}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """The tensors cover the data exactly once."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            gap = begin - position
            what = "overlaps the tensor before it" if gap < 0 else f"leaves {gap} bytes unused before it"
            raise _lies(path, f"{name} {what}")
        position = end
    if position > data_bytes:
        raise _truncated(path, "data", position, data_bytes)
    if position < data_bytes:
        raise _lies(path, f"{data_bytes - position} bytes at the end belong to no tensor")


def _lies(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} has a wrong header: {what}; {_AGAIN}")


def _truncated(path: Path, part: str, needed: int, found: int) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: its {part} needs {needed} bytes, {found} are there; {_AGAIN}")


def torch_dtype(tensor: StoredTensor) -> torch.dtype:
    """The torch type of a stored tensor.

    Raises:
        CheckpointError: the type has no reader here (U16, for example).
    """
    if tensor.dtype not in DTYPES:
        raise CheckpointError(
            f"{tensor.name} in {tensor.path} has the type {tensor.dtype}, which cannot be read; "
            "use a BF16 or F32 checkpoint"
        )
    return DTYPES[tensor.dtype]


def read(tensor: StoredTensor) -> torch.Tensor:
    """The tensor in fresh memory of its own size."""
    dtype = torch_dtype(tensor)
    if tensor.nbytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    buffer = pages.zeros(tensor.nbytes)
    view, done = memoryview(cast(Any, buffer.numpy())), 0
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            while done < tensor.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{tensor.path} ended while {tensor.name} was read; {_AGAIN}")
                done += count
            if sys.platform == "linux":  # a pass over a big file must not push everything else out of the cache
                os.posix_fadvise(file.fileno(), tensor.offset, tensor.nbytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{tensor.path} cannot be read: {error.strerror or error}") from None
    return buffer.view(dtype).view(tensor.shape)


class ShardMaps:
    """Memory maps of shard files, each made once; tensors over them share the file's pages and keep their map alive."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def mapped(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor over the mapped file: no copy, pages come in when touched, a write stays private to this process.

        A tensor that is not aligned to its element size is read instead.
        """
        dtype = torch_dtype(tensor)
        if tensor.nbytes == 0 or tensor.offset % dtype.itemsize:
            return read(tensor)
        try:
            if tensor.path not in self._maps:
                with tensor.path.open("rb") as file:
                    self._maps[tensor.path] = pages.mapped(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{tensor.path} cannot be mapped: {error.strerror or error}") from None
        count = math.prod(tensor.shape)
        flat = torch.frombuffer(self._maps[tensor.path], dtype=dtype, count=count, offset=tensor.offset)
        return flat.view(tensor.shape)

    def forget(self, path: Path) -> None:
        """Keeps a file no longer; its disk is free when the tensors over it are gone, too."""
        self._maps.pop(path, None)
