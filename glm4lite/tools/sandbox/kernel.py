"""Calls of the kernel that Python's library lacks. jail.py imports it without site-packages."""

import ctypes
import os
import sys
from typing import Any

if sys.platform == "win32":
    raise ImportError("Windows has none of the sandbox's calls")

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: Any) -> int:
    """A C function that says -1 for an error; that becomes OSError."""
    result: int = getattr(_libc, function)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: Any) -> int:
    """A system call by its number; whole numbers are passed as C longs."""
    wide = (ctypes.c_long(value) if isinstance(value, int) else value for value in arguments)
    return call("syscall", ctypes.c_long(number), *wide)


def address(data: bytes) -> tuple[ctypes.Array[ctypes.c_char], int]:
    """A buffer that holds `data`, to be kept while its address is in use, and that address."""
    buffer = ctypes.create_string_buffer(data, len(data))
    return buffer, ctypes.addressof(buffer)
