"""KeptPrefixes: the part of `--keep-prefixes` that knows a model: what of its prompts is on the disk, read and written.

The pool in memory (`glm4lite.engine.prefix_pool`) asks it where memory has less of a prompt than the disk, and tells it
which caches rest between two answers. Those are written by a thread of their own, a file of at most 16 MiB at a time,
and of each conversation only what no file holds yet: ids are hashed in blocks of 16, each with all before it, so that
conversations which begin alike share files. A cache that is taken again, or gives its memory up, is not waited for;
what of it was not written is written when it rests again, or not at all. So no step waits for a disk that writes, and
no more memory is held than one file takes.

The thread ends when nothing is left to write, and the program waits for it when it ends.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from glm4lite.base.errors import CheckpointError, ConfigError, one_line
from glm4lite.base.sizes import parse_size, readable
from glm4lite.engine.prefix_files import BLOCK, MOST_IDS, USUAL_SIZE, Damaged, PrefixFolder, Segment, as_bytes, digest
from glm4lite.engine.prefix_pool import PrefixCache
from glm4lite.hub.sources import NANO
from glm4lite.model.packed_cache import stored_forms
from glm4lite_quant.kernels import native

if TYPE_CHECKING:
    from glm4lite.checkpoint.checkpoint import Checkpoint
    from glm4lite.model.causal_lm import CausalLM

logger = logging.getLogger("glm4lite")

LEAST = BLOCK
"""Fewer new ids than this are neither written nor read: they are computed as fast."""

FILE_BYTES = 16 << 20
"""What one file holds at most: it is read whole for a part of it, and held while it is written."""

_AHEAD = 3  # files that are read while one is laid into memory
_READERS = 2
_SAMPLES, _SAMPLE_BYTES = 4, 64  # of each tensor
_CLOSING_S = 10.0


def wanted_size(asked: bool | int | str | None) -> int | None:
    """Bytes that kept prefixes may take: True is 4 GiB, None and False are nothing. Raises ConfigError."""
    if asked is None or isinstance(asked, bool):
        return USUAL_SIZE if asked else None
    size = parse_size(asked) if isinstance(asked, str) else asked
    if type(size) is not int or size < FILE_BYTES:
        raise ConfigError(f"the size of kept prefixes is {str(asked)[:100]!r}; give at least {readable(FILE_BYTES)}")
    return size


class _Run(NamedTuple):
    """Ids begin..end-1 of a file."""

    segment: Segment
    begin: int
    end: int


class _Piece(NamedTuple):
    """What is to be written of a cache: `ids` behind those that `parent` is the digest of, which lie in `before`."""

    cache: weakref.ref[PrefixCache]  # its memory may be needed while this is written
    before: list[Path]
    parent: bytes
    ids: list[int]
    data: list[memoryview]


class KeptPrefixes:
    """Prefixes of one model in a folder. `extend`, `rests` and `leaves` are for the thread that computes with it."""

    def __init__(
        self, model: CausalLM, name: str, key: bytes, folder: PrefixFolder, adapters: Mapping[str, bytes] = {}
    ) -> None:
        """`name`: for people. `key`: equal where what is computed is (`key_of`). `adapters`: those that may be chosen,
        each with what tells it from others."""
        self.name, self.key, self.folder = name, key, folder
        self._roots: dict[str | None, bytes] = {None: key}
        self._roots |= {adapter: digest(key, identity) for adapter, identity in adapters.items()}
        self._trunk = model.model
        self._id_bytes = self._trunk.cache_bytes
        self._most = min(max(FILE_BYTES // self._id_bytes // BLOCK, 1) * BLOCK, MOST_IDS)  # ids of a file
        self._lock = threading.Lock()  # of all below; not held while data are read or written
        self._files: dict[str, Segment | None] = {}  # None: not to be used
        self._after: dict[bytes, list[tuple[Segment, int, tuple[int, ...]]]] = {}  # digest of what is before -> blocks
        self._resting: deque[PrefixCache] = deque()
        self._written: list[list[Path]] = []  # files of prefixes that are written whole
        self._writer: threading.Thread | None = None
        self._said: set[str] = set()

    @classmethod
    def of(cls, model: CausalLM, source: str | Path, checkpoint: Checkpoint, folder: PrefixFolder) -> KeptPrefixes:
        """`source`: what a user calls the model. Raises CheckpointError."""
        told = model.model.adapter_identities
        always, choices = (b"", {}) if told is None else told()
        key = key_of(model, checkpoint)
        return cls(model, _named(source, model), digest(key, always) if always else key, folder, choices)

    # --- for the thread that computes

    def extend(self, cache: PrefixCache, ids: list[int], reserve: Callable[[int], bool]) -> None:
        """Cuts the cache back to what it has of `ids`, and appends what files have beyond that.

        `reserve`: makes room for so many ids in all; whether there is.
        """
        have = cache.keep_common_prefix(ids)
        with self._lock:
            self._look()
            runs = self._covering(ids[:-1], cache.adapter)
        if sum(run.end - run.begin for run in runs) < have + LEAST:
            return
        try:
            self._read(cache, ids, runs, reserve)
        except (RuntimeError, MemoryError) as error:  # of the device: the prompt's own error says more
            self._say("memory", f"a kept prefix was not used ({one_line(error, 200)})")
        finally:
            cache.settle()

    def rests(self, cache: PrefixCache) -> None:
        """Nobody changes this cache until `leaves`: it may be written."""
        with self._lock:
            self._resting.append(cache)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_resting, name="prefixes")
                try:
                    self._writer.start()
                except RuntimeError:  # the program is ending
                    self._writer = None
                    self._resting.clear()

    def leaves(self, cache: PrefixCache) -> None:
        """It is used again, or given up. Waits for milliseconds where a part of it is just being copied."""
        with self._lock:
            self._leave(cache)

    def close(self) -> None:
        """What rests is written, within ten seconds; no cache is held any more."""
        with self._lock:
            writer = self._writer
        if writer is not None:
            writer.join(_CLOSING_S)
        with self._lock:
            left = len(self._resting)
            self._resting.clear()
        if left:
            self._say("slow", "the disk is too slow for what was to be kept of the last prompts: not all of it is kept")

    def _leave(self, cache: PrefixCache) -> None:
        self._resting = deque(one for one in self._resting if one is not cache)

    # --- what files there are

    def _look(self) -> None:
        """Takes notice of files that came and went: others may use the folder."""
        names = self.folder.names(self.key)
        for name in self._files.keys() - names:
            self._forget(name)
        for name in sorted(names - self._files.keys()):
            try:
                segment = self.folder.head(self.key, name)
                if segment.nbytes != len(segment.ids) * self._id_bytes:
                    raise Damaged("its size does not fit")
            except FileNotFoundError:
                continue
            except (OSError, Damaged) as error:
                self._ignore(name, error)
            else:
                self._add(segment)

    def _add(self, segment: Segment) -> None:
        name = segment.path.name
        if self._files.get(name) is None:
            self._files[name] = segment
            for begin, before, block in segment.blocks():
                self._after.setdefault(before, []).append((segment, begin, block))

    def _forget(self, name: str) -> None:
        """The file is there no more."""
        segment = self._files.pop(name, None)
        for _, before, _ in segment.blocks() if segment is not None else ():
            left = [entry for entry in self._after.pop(before, ()) if entry[0] is not segment]
            if left:
                self._after[before] = left

    def _ignore(self, name: str, error: Exception) -> None:
        """What is damaged is not looked at again; it goes as the least recently used, or is written anew."""
        self._forget(name)
        self._files[name] = None
        why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 200)
        self._say("damaged", f"{self.folder.path_of(self.key, name)} is ignored: {why} (others will not be named)")

    def _covering(self, ids: Sequence[int], adapter: str | None = None) -> list[_Run]:
        """The parts of files that hold the beginning of `ids`, as far as any do."""
        runs, before, done = list[_Run](), self._roots[adapter], 0
        while done < len(ids):
            wanted = tuple(ids[done : done + BLOCK])
            found = max(self._after.get(before, ()), key=lambda entry: _common(entry[2], wanted), default=None)
            shared = _common(found[2], wanted) if found is not None else 0
            if found is None or not shared:
                break
            segment, begin, _ = found
            if runs and runs[-1].segment is segment and runs[-1].end == begin:
                runs[-1] = runs[-1]._replace(end=begin + shared)
            else:
                runs.append(_Run(segment, begin, begin + shared))
            done += shared
            if shared < BLOCK:
                break
            before = digest(before, as_bytes(wanted))
        return runs

    # --- reading

    def _read(self, cache: PrefixCache, ids: list[int], runs: list[_Run], reserve: Callable[[int], bool]) -> None:
        cache.cut(len(cache.ids) // BLOCK * BLOCK)  # where blocks of files begin
        needed, position = list[_Run](), 0
        for run in runs:
            known = min(max(len(cache.ids) - position, 0), run.end - run.begin)
            position += run.end - run.begin
            if known < run.end - run.begin:
                needed.append(run._replace(begin=run.begin + known))
        if not reserve(position):
            return
        with ThreadPoolExecutor(_READERS, "prefixes") as readers:
            reads, waiting = deque[Future[bytearray]](), iter(needed)
            for run in needed:
                reads.extend(readers.submit(ahead.segment.read) for ahead in islice(waiting, _AHEAD - len(reads)))
                try:
                    data = reads.popleft().result()
                except (OSError, Damaged) as error:
                    with self._lock:
                        if isinstance(error, FileNotFoundError):
                            self._forget(run.segment.path.name)
                        else:
                            self._ignore(run.segment.path.name, error)
                    break
                self._append(cache, run, data, position - len(cache.ids))
                cache.ids += ids[len(cache.ids) : len(cache.ids) + run.end - run.begin]
        self.folder.used([run.segment.path for run in runs])

    def _append(self, cache: PrefixCache, run: _Run, data: bytearray, room: int) -> None:
        """One file's part, to each layer's cache."""
        at, ids = 0, len(run.segment.ids)
        for layer, kept in zip(self._trunk.layers, cache.kv.layers, strict=True):
            parts = []
            for shape, dtype in stored_forms(self._trunk.config, self._trunk.kv, layer.dtype or self._trunk.dtype, ids):
                whole = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=at).view(shape)
                parts.append(whole[:, :, run.begin : run.end].to(layer.device))
                at += whole.nbytes
            kept.restore(tuple(parts), room)

    # --- writing

    def _write_resting(self) -> None:
        """The writer's thread, until nothing is left."""
        while True:
            with self._lock:
                piece = self._next_piece()
                written, self._written = self._written, []
                if piece is None and not written:
                    self._writer = None
                    return
            for paths in written:
                self.folder.used(paths)
            if piece is not None:
                self._write(piece)

    def _next_piece(self) -> _Piece | None:
        """A copy of what no file holds of the cache that rests longest."""
        while self._resting:
            cache = self._resting[0]
            runs = self._covering(cache.ids, cache.adapter)
            covered, paths = sum(run.end - run.begin for run in runs), [run.segment.path for run in runs]
            if len(cache.ids) - covered >= LEAST:
                begin = covered // BLOCK * BLOCK
                ids = cache.ids[begin : begin + self._most]
                try:
                    data = _bytes(layer.stored(begin, begin + len(ids)) for layer in cache.kv.layers)
                    return _Piece(weakref.ref(cache), paths, self._digest(cache.ids[:begin], cache.adapter), ids, data)
                except (RuntimeError, MemoryError) as error:
                    self._say("memory", f"a prompt is not kept ({one_line(error, 200)})")
            elif paths:
                self._written.append(paths)
            self._resting.popleft()
        return None

    def _digest(self, ids: Sequence[int], adapter: str | None) -> bytes:
        """Of whole blocks."""
        before = self._roots[adapter]
        for begin in range(0, len(ids), BLOCK):
            before = digest(before, as_bytes(ids[begin : begin + BLOCK]))
        return before

    def _write(self, piece: _Piece) -> None:
        segment = None
        try:
            segment = self.folder.write(self.key, piece.parent, piece.ids, self.name, piece.data, set(piece.before))
            if segment is None:
                self._say("room", f"{self.folder.path} has no room for all of a prompt: its beginning alone is kept")
        except OSError as error:
            self._say("disk", f"prompts are not kept: {self.folder.path}: {error.strerror or one_line(error, 200)}")
        with self._lock:
            if segment is not None:
                self._add(segment)
            elif (cache := piece.cache()) is not None:
                self._leave(cache)

    def _say(self, kind: str, what: str) -> None:
        """Once of a kind."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s", what)


def _named(source: str | Path, model: CausalLM) -> str:
    """What a user knows a model by, and how it is computed."""
    made: dict[str, Any] = getattr(model.config, "quantization_config", None) or {}
    weights = f"int{made['bits']}" if "bits" in made else made.get("bnb_4bit_quant_type", str(model.dtype)[6:])
    where = str(Path(source).resolve()) if source != NANO and Path(source).is_dir() else str(source)
    return f"{where} ({weights}, {model.model.kv} cache)"


def key_of(model: CausalLM, checkpoint: Checkpoint) -> bytes:
    """Equal where the same ids give the same keys and values: weights, quantization, cache, kernels, versions.

    Weights are told by their files' headers, sizes and times, and by samples of every tensor: two models of one shape
    have the same headers, and files that a tool unpacked may have the same time. Paths do not matter.
    """
    trunk, backend = model.model, native.backend()
    layers = [(str(layer.device), str(layer.dtype), layer.store.fused(layer)) for layer in trunk.layers]
    gpus = {torch.cuda.get_device_name(layer.device) for layer in trunk.layers if layer.device.type == "cuda"}
    config = trunk.config.to_dict() | {"name_or_path": "", "_name_or_path": ""}
    made = (
        (version("glm4lite"), torch.__version__, backend.name if backend is not None else "torch", sorted(gpus)),
        (config, str(trunk.dtype), trunk.kv, layers, repr(trunk)),
    )
    return digest(json.dumps(made, sort_keys=True, default=str).encode(), _weights(checkpoint))


def _weights(checkpoint: Checkpoint) -> bytes:
    tensors = [checkpoint.stored(name) for name in sorted(checkpoint.names())]
    parts = [repr((one.name, one.dtype, one.shape, one.offset)).encode() for one in tensors]
    for path in sorted({one.path for one in tensors}):
        try:
            with open(path, "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                parts.append(repr((path.name, found.st_size, found.st_mtime_ns)).encode())
                for one in (tensor for tensor in tensors if tensor.path == path):
                    for part in range(_SAMPLES):
                        file.seek(one.offset + max(one.nbytes - _SAMPLE_BYTES, 0) * part // (_SAMPLES - 1))
                        parts.append(file.read(min(_SAMPLE_BYTES, one.nbytes)))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return digest(*parts)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many ids they begin with together."""
    if one == other:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _bytes(layers: Iterator[tuple[Tensor, ...]]) -> list[memoryview]:
    tensors = [tensor for stored in layers for tensor in stored]
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().data for tensor in tensors]
