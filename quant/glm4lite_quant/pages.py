"""Memory for weights: at an aligned address, and in huge pages where the system has them.

A token reads every weight once, so with small pages the processor looks up an address for each 4 KiB; many systems give
huge pages only to those who ask.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 2 << 20


def zeros(nbytes: int) -> Tensor:
    """uint8 [nbytes] in memory of its own, aligned to a page; it costs nothing until it is written.

    Raises:
        MemoryError: there is not so much.
    """
    try:
        if sys.platform == "win32":
            pages = mmap.mmap(-1, max(nbytes, 1))
        else:  # shared memory has no huge pages, and is not counted as the process's own
            pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes of memory cannot be had: {error.strerror}") from None
    if sys.platform == "linux" and nbytes >= HUGE:
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes)
