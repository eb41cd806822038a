"""Gives up rights, then becomes the Python that runs a model's code.

Run by process.py as a script (it imports nothing of glm4lite) in the work folder: the code comes on stdin, what to
limit as JSON in argv[1], and what could not be limited goes as JSON to the file descriptor argv[2].

On Linux: namespaces (no network, processes that all end with the first, a work folder of limited size in memory),
Landlock (only Python itself can be read, only the work folder written), root becomes a user without rights. Where the
system gives no namespaces (containers, some distributions) the code can start no processes at all. Elsewhere the
resource limits remain. man pages: namespaces(7), user_namespaces(7), landlock(7), getrlimit(2).
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

NOBODY = 65533  # not 65534, which other programs use too: the limit of processes counts by user
MAIN = "main.py"
REFUSED = 125  # the exit status when the code was not run

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
_CLONE_NEWPID, _CLONE_NEWNET = 0x20000000, 0x40000000
_NAMESPACES = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
# What a Python program reads beside Python itself: shared libraries, time zones, harmless devices.
_READABLE = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: Any) -> int:
    """A C function that says -1 for an error; that becomes OSError."""
    result: int = getattr(_libc, function)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def _syscall(number: int, *arguments: Any) -> int:
    return _call("syscall", ctypes.c_long(number), *arguments)


def _namespaces() -> bool:
    """New namespaces for this process and its children, as whoever it is now; False where they are not allowed."""
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", _NAMESPACES if user == 0 else _NAMESPACES | _CLONE_NEWUSER)
        if user != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError:
        return False
    return True


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _call(
        "mount", source.encode(), os.fsencode(target), kind and kind.encode(), ctypes.c_ulong(flags), options.encode()
    )


def _mounts(limits: dict[str, Any]) -> None:
    """The work folder becomes a file system in memory, which ends with the process."""
    folder = os.getcwd()
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    if os.geteuid() == 0:
        _show_to_everybody(limits["python"])
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={limits['disk']},nr_inodes=4096,mode=0700")
    os.chdir(folder)


def _show_to_everybody(folders: list[str]) -> None:
    """Root's Python may lie in /root, closed to NOBODY: there an empty folder is laid over, and Python into it."""
    closed = {folder: blocked for folder in folders if (blocked := _closed_above(folder))}
    handles = {folder: os.open(folder, os.O_PATH) for folder in closed}
    for blocked in set(closed.values()):
        _mount("tmpfs", blocked, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for folder, handle in handles.items():
        os.makedirs(folder, exist_ok=True)
        _mount(f"/proc/self/fd/{handle}", folder, None, _MS_BIND | _MS_REC)
        os.close(handle)


def _closed_above(folder: str) -> str | None:
    """The topmost folder on the way that not everybody may enter."""
    ways = [*reversed(Path(folder).parents), Path(folder)]
    return next((str(way) for way in ways if not way.stat().st_mode & 0o001), None)


def _give_up_root(python: list[str]) -> None:
    """Root becomes NOBODY, because no limit of processes holds for root."""
    if os.geteuid() != 0:
        return
    if any(_closed_above(folder) for folder in python):
        raise PermissionError("root's Python cannot be run by a user without rights; run glm4lite as an ordinary user")
    os.chown(".", NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _landlock(readable: list[str]) -> None:
    """Reading only there, writing only in the work folder, no TCP; OSError where the kernel has no Landlock."""
    version = _syscall(_LANDLOCK_CREATE, None, 0, 1)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), 0)
    allowed = dict.fromkeys([*_READABLE, *readable], _EXECUTE | _READ_FILE | _READ_DIR)
    for path, wanted in (allowed | dict.fromkeys(_DEVICES, _READ_FILE | _WRITE_FILE) | {".": rights}).items():
        if not os.path.exists(path):
            continue
        handle = os.open(path, os.O_PATH)
        right = wanted & rights & (~0 if os.path.isdir(path) else _FILE_RIGHTS)
        _syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", right, handle), 0)
        os.close(handle)
    _syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _resources(limits: dict[str, Any], isolated: bool) -> None:
    """Limits of each process. Without namespaces a process that leaves its group would live on: so it starts none."""
    wanted = {
        "RLIMIT_CPU": limits["cpu"],
        "RLIMIT_AS": limits["memory"],
        "RLIMIT_FSIZE": limits["file"],
        "RLIMIT_NOFILE": 128,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": limits["processes"] if isolated else 0,
    }
    for name, value in wanted.items():
        kind = getattr(resource, name)
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):
            if sys.platform == "linux":  # macOS knows RLIMIT_AS and refuses it
                raise


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _in_child() -> None:
    """Goes on in a child and ends with its status."""
    child = os.fork()
    if child:
        while True:
            ended, status = os.wait()  # as the first process of its namespace it also gets the orphans
            if ended == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
    _die_with_parent()


def main() -> NoReturn:
    """Take the code, give up rights, say which limits do not hold, become Python."""
    limits, report = json.loads(sys.argv[1]), int(sys.argv[2])
    code = sys.stdin.buffer.read()
    _die_with_parent()
    linux = sys.platform == "linux"
    if linux:
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # when memory is short, this goes first
    isolated, missing = linux and _namespaces(), list[str]()
    if isolated:
        try:
            _mounts(limits)
        except OSError:  # AppArmor may forbid mounts in a namespace
            missing.append("space on disk")
        _in_child()  # the first process of the new namespace: when it ends, so do all the others
        _in_child()  # signals do not reach a first process as they do others, so the code runs in the second
    else:
        missing += ["network", "space on disk"]
    Path(MAIN).write_bytes(code)
    _give_up_root(limits["python"])
    if linux:
        _die_with_parent()  # giving up root forgot it
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _resources(limits, isolated)
    try:
        _landlock(limits["python"])
    except (OSError, KeyError, AttributeError):
        missing.append("reading files")
    os.write(report, json.dumps(missing).encode())
    os.close(report)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, 64)
    os.execv(sys.executable, [sys.executable, "-I", "-X", "utf8", MAIN])


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # nothing of the code has run
        sys.stderr.write(f"the sandbox could not be set up: {error}\n")
        os._exit(REFUSED)
