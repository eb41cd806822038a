"""What the process may do with files, by path: landlock(7). The second wall where mounts.py has hidden the rest."""

import errno
import os
import struct
import sys
from collections.abc import Iterable

from glm4lite.tools.sandbox.kernel import syscall

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE


def restrict(readable: Iterable[str], devices: Iterable[str], writable: Iterable[str]) -> None:
    """Reading and writing only there, no TCP, no signals to others; OSError where the kernel has no Landlock."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "only Linux has Landlock")
    version = syscall(_CREATE, None, 0, 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = syscall(_CREATE, rules, len(rules), 0)
    wanted = (
        dict.fromkeys(readable, _EXECUTE | _READ_FILE | _READ_DIR)
        | dict.fromkeys(devices, _READ_FILE | _WRITE_FILE)
        | dict.fromkeys(writable, rights)
    )
    for path, right in wanted.items():
        if not os.path.exists(path):
            continue
        handle = os.open(path, os.O_PATH)
        right &= rights & (~0 if os.path.isdir(path) else _FILE_RIGHTS)
        syscall(_ADD, ruleset, 1, struct.pack("=Qi", right, handle), 0)
        os.close(handle)
    syscall(_RESTRICT, ruleset, 0)
    os.close(ruleset)
