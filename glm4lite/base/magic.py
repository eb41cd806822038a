"""What a file is that should hold something else, told by its first bytes, so that an error names the cause."""

from __future__ import annotations

import os
from pathlib import Path

START_BYTES = 512
"""As many of a file's first bytes as `mistaken_for` looks at."""

_AGAIN = "download it again"
_LFS = "`git lfs install` and `git lfs pull` in its folder fetch it, or give the model's Hub id instead of the folder"
_XET = "`git xet install` and `git pull` in its folder fetch it, or give the model's Hub id instead of the folder"
_ANNEX = "`git annex get` fetches it"
_CONVERT = "use the model's safetensors version, or convert it where you trust it"
_UNPACK = "unpack it, and give the folder that was packed"

_KINDS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b"version https://git-lfs", b"version https://hawser"), "a git-lfs pointer, not the file itself", _LFS),
    ((b"# xet version",), "a git-xet pointer, not the file itself", _XET),
    ((b"/annex/objects/",), "a git-annex pointer, not the file itself", _ANNEX),
    ((b"GGUF",), "a GGUF file", "give the file itself as the model, under a name that ends with .gguf"),
    ((b"ggml", b"ggjt"), "a file of the time before GGUF", _CONVERT),
    ((b"PK\x03\x04",), "a zip archive (as torch's pickle files are)", _CONVERT),
    (tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6)), "a pickle file", _CONVERT),
    ((b"\x89HDF",), "an HDF5 file", _CONVERT),
    ((b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"), "a compressed archive", _UNPACK),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_REFUSALS = (b"entry not found", b"invalid ", b"access to ", b"repository not found", b"unauthorized", b"forbidden")
_TAR = slice(257, 262)


def mistaken_for(start: bytes) -> str | None:
    """What a file is that begins like this, and what helps ("a git-lfs pointer, …; …"); None where that is not known.

    Ask only where the file is not what it should be: a real one may begin with any bytes.
    """
    for beginnings, what, advice in _KINDS:
        if start.startswith(beginnings):
            return f"{what}; {advice}"
    if start[_TAR] == b"ustar":
        return f"a tar archive; {_UNPACK}"
    if not start:
        return f"empty; {_AGAIN}"
    if not start.strip(b"\0"):
        return f"a download that was not finished: it begins with zeros; {_AGAIN}"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES):
        return f"a web page, maybe a site's error or login, saved under this name; {_AGAIN}"
    if text.startswith(_REFUSALS) or text.startswith(b'{"error"'):
        return f"a server's refusal, saved under this name; {_AGAIN}, with access to the model"
    return None


def dangling(path: Path) -> str | None:
    """What a link is that leads nowhere, and what helps; None where `path` is no such link."""
    if not path.is_symlink() or path.exists():
        return None
    target = os.readlink(path)
    if ".git/annex/" in target:
        return f"a git-annex link to a file that is not here; {_ANNEX}"
    return (
        "a link to a file that is not here; copy the folder with the files its links lead to (`cp -rL`), or download it"
    )
