"""Layers' weights read ahead from disk, round and round, into a ring of buffers.

One pass over a model reads its layers on disk in order, and the next pass begins with the first again: while a layer is
computed, threads read those after it. Nothing is decoded or copied on the way: the bytes are the quantized planes as
they lie in the file, and the kernels read them in the buffer.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from torch import Tensor

from glm4lite.base.direct_io import ALIGNMENT, DirectFile, Extent
from glm4lite.memory.resources import RING_BUFFERS
from glm4lite_quant import pages

BLOCK_BYTES = 8 << 20  # of one read: smaller ones leave the disk waiting
READERS = 2
CLOSING_S = 5.0  # waited for a thread in the middle of a read, at most


@dataclass(frozen=True)
class Span:
    """Where one layer's bytes lie: parts of one or more files, one after another in the buffer."""

    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)


@dataclass(eq=False)
class _Slot:
    """One buffer: the span it holds or is being filled with, and how many reads are still to come."""

    memory: Tensor
    view: memoryview
    index: int = -1
    pending: int = 0


class _Read(NamedTuple):
    slot: _Slot
    file: DirectFile
    offset: int
    target: memoryview


@dataclass
class _Shared:
    """What the reading threads share with the ring; they must not keep the ring itself alive."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    queue: deque[_Read] = field(default_factory=deque)
    active: int = 0  # reads under way
    error: BaseException | None = None
    closed: bool = False
    bytes_read: int = 0


class WeightRing:
    """Spans in cyclic order; `acquire(i)` waits for span i and gives its bytes, `release()` lets the next be read.

    One thread uses it at a time. Asking for another span than the next one (a pass that was stopped half-way begins
    anew) starts reading from there.
    """

    def __init__(self, spans: Sequence[Span], slots: int = RING_BUFFERS, readers: int = READERS) -> None:
        self._spans = spans
        self._shared = shared = _Shared()
        size = max(span.nbytes for span in spans)
        self._free = [_slot(size) for _ in range(min(slots, len(spans)))]
        self._ahead: deque[_Slot] = deque()  # being filled or full, in the order they will be asked for
        self._next = 0  # the span that is read next
        self.nbytes = size * len(self._free)
        self.waited_s = 0.0  # for the disk, so far
        threads = [threading.Thread(target=_serve, args=(shared,), daemon=True) for _ in range(readers)]
        for thread in threads:
            thread.start()
        weakref.finalize(self, _close, shared, threads)

    @property
    def bytes_read(self) -> int:
        return self._shared.bytes_read

    @property
    def layers_bytes(self) -> int:
        """What one pass reads."""
        return sum(span.nbytes for span in self._spans)

    @property
    def extents(self) -> list[Extent]:
        """What a pass reads, in order."""
        return [extent for span in self._spans for extent in span.extents]

    def acquire(self, index: int) -> Tensor:
        """uint8: the buffer with span `index` at its beginning; it stays as it is until `release`.

        Raises:
            CheckpointError: the disk failed or a file was changed; the next call tries again.
        """
        shared, started = self._shared, time.perf_counter()
        with shared.changed:
            if not self._ahead or self._ahead[0].index != index:
                self._restart(index)
            slot = self._ahead[0]
            while slot.pending and shared.error is None:
                shared.changed.wait()
            if shared.error is not None:
                error = shared.error
                self._stop_reading()
                raise error
        for extent in self._spans[index].extents:
            extent.file.check_unchanged()
        self.waited_s += time.perf_counter() - started
        return slot.memory

    def release(self) -> None:
        """Gives back the buffer that was acquired last."""
        with self._shared.changed:
            self._free.append(self._ahead.popleft())
            self._fill()

    def _restart(self, index: int) -> None:
        self._stop_reading()
        self._next = index
        self._fill()

    def _stop_reading(self) -> None:
        """Forgets what is read or queued; waits for the reads under way, for they write into the buffers."""
        shared = self._shared
        shared.queue.clear()
        while shared.active:
            shared.changed.wait()
        shared.error = None
        self._free.extend(self._ahead)
        self._ahead.clear()

    def _fill(self) -> None:
        while self._free:
            slot, span = self._free.pop(), self._spans[self._next]
            reads = [read for extent in span.extents for read in _reads(slot, extent)]
            slot.index, slot.pending = self._next, len(reads)
            self._shared.queue.extend(reads)
            self._ahead.append(slot)
            self._next = (self._next + 1) % len(self._spans)
        self._shared.changed.notify_all()


def _slot(size: int) -> _Slot:
    memory = pages.zeros(size)
    return _Slot(memory, memoryview(cast(Any, memory.numpy())))


def _reads(slot: _Slot, extent: Extent) -> list[_Read]:
    steps = range(0, extent.nbytes, BLOCK_BYTES)
    sizes = [min(BLOCK_BYTES, extent.nbytes - step) for step in steps]
    return [
        _Read(slot, extent.file, extent.offset + step, slot.view[extent.at + step : extent.at + step + size])
        for step, size in zip(steps, sizes, strict=True)
    ]


def _serve(shared: _Shared) -> None:
    """A reading thread's life."""
    while True:
        with shared.changed:
            while not shared.queue and not shared.closed:
                shared.changed.wait()
            if shared.closed:
                return
            read = shared.queue.popleft()
            shared.active += 1
        error: BaseException | None = None
        try:
            read.file.read_into(read.target, read.offset)
        except BaseException as caught:  # it is raised where the bytes are waited for
            error = caught
        with shared.changed:
            shared.active -= 1
            shared.bytes_read += len(read.target)
            read.slot.pending -= 1
            if error is not None:
                shared.error = error
                shared.queue.clear()
            if error is not None or not shared.active or not read.slot.pending:
                shared.changed.notify_all()


def _close(shared: _Shared, threads: list[threading.Thread]) -> None:
    with shared.changed:
        shared.closed = True
        shared.queue.clear()
        shared.changed.notify_all()
    for thread in threads:  # one that still runs when the interpreter ends would end it badly
        thread.join(timeout=CLOSING_S)


def span_of(parts: Sequence[tuple[DirectFile, int, int]]) -> tuple[Span, list[int]]:
    """Tensors as (file, offset, bytes) -> the span that covers them and each one's place in the buffer.

    Neighbours in a file become one extent, with the few bytes between them.
    """
    order = sorted(range(len(parts)), key=lambda i: (str(parts[i][0].path), parts[i][1]))
    extents: list[Extent] = []
    places = [0] * len(parts)
    for i in order:
        file, offset, nbytes = parts[i]
        begin, end = offset // ALIGNMENT * ALIGNMENT, -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
        last = extents[-1] if extents else None
        if last is not None and last.file is file and begin <= last.offset + last.nbytes + BLOCK_BYTES // 8:
            extents[-1] = last._replace(nbytes=max(last.nbytes, end - last.offset))
        else:
            extents.append(Extent(file, begin, end - begin, 0 if last is None else last.at + last.nbytes))
        places[i] = extents[-1].at + offset - extents[-1].offset
    return Span(tuple(extents)), places
