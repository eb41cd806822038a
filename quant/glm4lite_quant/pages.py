"""Memory for weights, their own or a file's: at an aligned address, in huge pages where the system has them.

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
    _in_huge_pages(pages)
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes)


def mapped(file: int) -> mmap.mmap:
    """The whole of an open file: no copy, pages come in when touched, and what is written to them is not in the file.

    Where the file system can, they come from the disk as huge pages; what other programs have read stays as it is.

    Raises:
        OSError: it cannot be mapped.
    """
    pages = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
    _in_huge_pages(pages)
    return pages


def _in_huge_pages(pages: mmap.mmap) -> None:
    if sys.platform == "linux" and len(pages) >= HUGE:
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
