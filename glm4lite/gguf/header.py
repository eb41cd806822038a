"""A GGUF file's header: metadata and where each tensor lies, checked before a byte of the tensors is used.

Why not gguf's own reader: it makes a numpy array of each string of a vocabulary, and what a stranger's file may say
wrong is not its matter. Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts,
key-value pairs, one entry a tensor, and from a multiple of `general.alignment` on the data.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from glm4lite.base.errors import CheckpointError
from glm4lite.base.files import open_file, some
from glm4lite.base.magic import START_BYTES, mistaken_for
from glm4lite.base.stored_tensor import StoredTensor

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)

BLOCKS: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""ggml's number of a type -> its name, the weights of a block, and a block's bytes."""

PLAIN = ("F32", "F16", "BF16")
"""Types that safetensors has too, by the same names."""

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_TENSORS, _MAX_KEYS, _MAX_ITEMS, _MAX_KEY = 1 << 16, 1 << 16, 1 << 22, 1 << 16
_MAX_STRING, _MAX_DIMENSIONS, _MAX_ALIGNMENT = 16 << 20, 4, 1 << 16
_AGAIN = "download it again"


@dataclass(frozen=True)
class Header:
    """Metadata by key; tensors in file order, quantized ones as rows of bytes (U8), with the type of each by name."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    types: dict[str, str]


def read_headers(path: Path) -> Header:
    """The header of a file, or of all files that a model is split into.

    Raises:
        CheckpointError: it is no GGUF file, is cut short, contradicts itself, or a part of the model is missing.
    """
    files = parts_of(path)
    headers = [_read(file) for file in files]
    count = headers[0].metadata.get("split.count", 1)
    if count != len(files):
        what = f"is one of {count} files" if len(files) == 1 else f"says it is split into {count} files"
        raise CheckpointError(
            f"{path} {what}; keep all of them in its folder, under the names they were published with"
        )
    merged = headers[0]
    for file, other in zip(files[1:], headers[1:], strict=True):
        twice = merged.tensors.keys() & other.tensors.keys()
        if twice:
            raise CheckpointError(f"{file} holds {some(sorted(twice))}, as another part does; {_AGAIN}")
        merged.tensors.update(other.tensors)
        merged.types.update(other.types)
    return merged


def parts_of(path: Path) -> list[Path]:
    """The files of a model, of which `path` is one; CheckpointError where one is missing."""
    split = _SPLIT.fullmatch(path.name)
    if split is None or not 0 < int(split[3]) <= 1000:
        return [path]
    files = [path.with_name(f"{split[1]}-{number:05d}-of-{split[3]}.gguf") for number in range(1, int(split[3]) + 1)]
    missing = [file.name for file in files if not os.path.lexists(file)]
    if missing:
        raise CheckpointError(f"{path.parent} lacks {some(missing)}, a part of {path.name}; download it too")
    return files


def _read(path: Path) -> Header:
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(START_BYTES)
            if not start.startswith(MAGIC) or size < 24:
                what = None if start.startswith(MAGIC) else mistaken_for(start)
                raise CheckpointError(f"{path} is {what or f'no GGUF file; {_AGAIN}'}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


class _Reader:
    """Reads from the beginning on; each length is compared with what is left of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, len(MAGIC)

    def header(self) -> Header:
        version = self._number("<I")
        if version not in VERSIONS:
            big = version in (2 << 24, 3 << 24)
            why = "it is of a big-endian machine" if big else "versions 2 and 3 can be read"
            raise CheckpointError(f"{self.path} is GGUF of version {version}; {why}")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise self._lies(f"it speaks of {tensors} tensors and {keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string(_MAX_KEY)
            if key in metadata:
                raise self._lies(f"the key {reprlib.repr(key)} appears twice")
            metadata[key] = self._value(self._number("<I"))
        entries = [self._entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment % 8:
            raise self._lies(f"general.alignment is {reprlib.repr(alignment)}")
        return self._placed(metadata, entries, -(-self.at // alignment) * alignment, alignment)

    def _placed(
        self, metadata: dict[str, Any], entries: list[tuple[str, list[int], int, int]], data: int, alignment: int
    ) -> Header:
        found: dict[str, StoredTensor] = {}
        types: dict[str, str] = {}
        for name, dimensions, kind, offset in entries:
            if name in found:
                raise self._lies(f"{name} appears twice")
            if kind not in BLOCKS:
                known = "known to this version"
                raise CheckpointError(
                    f"{self.path}: {name} has the type {kind}, which is not {known}; use another file"
                )
            types[name], weights, size = BLOCKS[kind]
            *rows, columns = dimensions[::-1]
            if columns % weights:
                raise self._lies(f"{name} has rows of {columns} {types[name]} weights, no multiple of {weights}")
            plain = types[name] in PLAIN
            shape = (*rows, columns if plain else columns // weights * size)
            tensor = StoredTensor(name, types[name] if plain else "U8", shape, self.path, data + offset)
            if offset % alignment or tensor.offset + tensor.nbytes > len(self.data):
                raise self._lies(f"{name} lies at {offset}, of {max(len(self.data) - data, 0)} bytes of data")
            found[name] = tensor
        spans = sorted((tensor.offset, tensor.offset + tensor.nbytes, name) for name, tensor in found.items())
        for (_, end, _), (begin, _, name) in pairwise(spans):
            if begin < end:
                raise self._lies(f"{name} overlaps the tensor before it")
        return Header(metadata, found, types)

    def _entry(self) -> tuple[str, list[int], int, int]:
        name = self._string(_MAX_KEY)
        if not name or len(name) > 1000 or not name.isprintable():
            raise self._lies(f"{reprlib.repr(name)} is no name of a tensor")
        count = self._number("<I")
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise self._lies(f"{name} has {count} dimensions")
        dimensions = [self._number("<Q") for _ in range(count)]
        if not all(dimensions) or math.prod(dimensions) > len(self.data) * 8:
            raise self._lies(f"{name} has the shape {dimensions}")
        return name, dimensions, self._number("<I"), self._number("<Q")

    def _value(self, kind: int, within: bool = False) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string(_MAX_STRING)
        if kind != _ARRAY or within:
            raise self._lies(f"a value has the type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        if count > _MAX_ITEMS:
            raise self._lies(f"a list has {count} items")
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner][1]}"
            return list(struct.unpack(form, self._bytes(struct.calcsize(form))))
        return [self._value(inner, within=True) for _ in range(count)]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _string(self, most: int) -> str:
        length = self._number("<Q")
        if length > most:
            raise self._lies(f"a text has {length} bytes")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._lies("a text is not UTF-8") from None

    def _bytes(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise CheckpointError(f"{self.path} is truncated: its header ends beyond the file; {_AGAIN}")
        self.at += count
        return self.data[self.at - count : self.at]

    def _lies(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} has a wrong header: {what}; {_AGAIN}")
