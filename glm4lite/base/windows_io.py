"""Windows' calls for reads by position, past its cache: CreateFileW, ReadFile and GetOverlappedResult."""

import sys

if sys.platform != "win32":
    raise ImportError("these are calls of Windows")

import ctypes
import msvcrt
import os
import threading
from ctypes import wintypes
from pathlib import Path

_READ, _SHARE_ALL, _EXISTING = 0x80000000, 7, 3
_NO_BUFFERING, _OVERLAPPED = 0x20000000, 0x40000000
_END, _PENDING = 38, 997  # error codes
_INVALID = wintypes.HANDLE(-1).value


class _Overlapped(ctypes.Structure):
    _fields_ = [
        ("internal", ctypes.c_void_p),
        ("internal_high", ctypes.c_void_p),
        ("offset", wintypes.DWORD),
        ("offset_high", wintypes.DWORD),
        ("event", wintypes.HANDLE),
    ]


_kernel = ctypes.WinDLL("kernel32", use_last_error=True)
_open, _read, _result, _event = _kernel.CreateFileW, _kernel.ReadFile, _kernel.GetOverlappedResult, _kernel.CreateEventW
_open.restype = _event.restype = wintypes.HANDLE
_open.argtypes = [wintypes.LPCWSTR, *[wintypes.DWORD] * 2, ctypes.c_void_p, *[wintypes.DWORD] * 2, wintypes.HANDLE]
_event.argtypes = [ctypes.c_void_p, wintypes.BOOL, wintypes.BOOL, wintypes.LPCWSTR]
_read.argtypes = [wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD, ctypes.c_void_p, ctypes.POINTER(_Overlapped)]
_result.argtypes = [wintypes.HANDLE, ctypes.POINTER(_Overlapped), ctypes.POINTER(wintypes.DWORD), wintypes.BOOL]
_own = threading.local()


def open_direct(path: Path) -> int:
    """A descriptor to be read with `read_at`, past the cache. OSError.

    The file may be renamed and removed meanwhile, as on other systems.
    """
    handle = _open(str(path), _READ, _SHARE_ALL, None, _EXISTING, _NO_BUFFERING | _OVERLAPPED, None)
    if handle == _INVALID:
        raise ctypes.WinError(ctypes.get_last_error())
    return msvcrt.open_osfhandle(handle, os.O_RDONLY)


def read_at(descriptor: int, target: memoryview, offset: int) -> int:
    """Bytes read into `target` from `offset`, 0 at the end; from several threads at once. OSError."""
    if not hasattr(_own, "event"):
        _own.event = _event(None, True, False, None)
    handle = msvcrt.get_osfhandle(descriptor)
    place = _Overlapped(None, None, offset & 0xFFFFFFFF, offset >> 32, _own.event)
    count, address = wintypes.DWORD(), ctypes.addressof(ctypes.c_char.from_buffer(target))
    begun = _read(handle, address, len(target), None, place) or ctypes.get_last_error() == _PENDING
    if begun and _result(handle, place, count, True):
        return count.value
    code = ctypes.get_last_error()
    if code == _END:
        return 0
    raise ctypes.WinError(code)
