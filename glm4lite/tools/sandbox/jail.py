"""Gives up rights, then becomes the Python that runs a model's code.

Run by process.py as a script, without site-packages, in the work folder: the code comes on stdin, what to limit as JSON
in argv[1], and what could not be limited goes as JSON to the file descriptor argv[2].

On Linux: namespaces (no network, processes that all end with the first), a file system that holds Python and a work
folder of limited size only (mounts.py), Landlock, a filter of system calls (seccomp.py); root becomes a user without
rights. Where the system gives no namespaces (containers, some distributions) the code can start no processes at all.
Elsewhere the resource limits remain. man pages: namespaces(7), user_namespaces(7), capabilities(7), getrlimit(2).
"""

import json
import os
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

if sys.platform == "win32":
    raise ImportError("Windows has none of the sandbox's calls")

import resource

sys.path.append(str(Path(__file__).parents[3]))  # behind the standard library, which nothing here may replace

from glm4lite.tools.sandbox import landlock, mounts, seccomp
from glm4lite.tools.sandbox.kernel import call

NOBODY = 65533  # not 65534, which other programs use too: the limit of processes counts by user
MAIN = "main.py"
REFUSED = 125  # the exit status when the code was not run

_CLONE_NEWNS, _CLONE_NEWCGROUP, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = _CLONE_NEWNS | _CLONE_NEWCGROUP | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _CLEAR_ALL = 1, 24, 38, 47, 4
_CAPABILITIES_V3 = 0x20080522

# What a Python program reads beside Python itself: shared libraries, time zones, harmless devices.
_READABLE = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class _Walls:
    """What stands between the code and the system."""

    isolated = False  # namespaces: no network, no process left behind
    hidden = False  # a file system of its own
    landlock = False
    filtered = False  # system calls

    def missing(self) -> list[str]:
        """What is not limited, for the user who is asked whether the code may run."""
        gaps = {
            "network": not (self.isolated or self.filtered),
            "space on disk": not self.hidden,
            "reading files": not (self.hidden or self.landlock),
            "changing files": not (self.hidden or (self.landlock and self.filtered)),
            "seeing which files exist": not self.hidden,
            "calls of the kernel": not self.filtered,
        }
        return [name for name, open_ in gaps.items() if open_]


def _namespaces() -> bool:
    """New namespaces for this process and its children, as whoever it is now; False where they are not allowed."""
    user, group = os.geteuid(), os.getegid()
    try:
        call("unshare", _NAMESPACES if user == 0 else _NAMESPACES | _CLONE_NEWUSER)
        if user != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        call("sethostname", b"sandbox", 7)
    except OSError:
        return False
    return True


def _hide(limits: dict[str, Any]) -> bool:
    """The code gets a file system of its own; False where mounts are not allowed."""
    owner = os.geteuid() or NOBODY
    try:
        mounts.hide_all_but([*_READABLE, *limits["python"]], _DEVICES, limits["disk"], owner)
    except OSError:  # AppArmor may forbid mounts in a namespace; an old kernel cannot do it
        return False
    return True


def _give_up_root(python: list[str]) -> None:
    """Root becomes NOBODY, because no limit of processes holds for root."""
    if os.geteuid() != 0:
        return
    ways = {way for place in python for way in Path(os.path.realpath(place)).parents}
    if not all(way.stat().st_mode & 0o001 for way in ways):
        raise PermissionError("root's Python cannot be run by a user without rights; run glm4lite as an ordinary user")
    os.chown(".", NOBODY, NOBODY)
    os.setgroups([])
    os.setgid(NOBODY)  # root's calls set the saved ids too
    os.setuid(NOBODY)


def _give_up_capabilities() -> None:
    """None is left, and none can come back; a process without any may not drop those it cannot have."""
    with suppress(OSError):
        for capability in range(64):
            call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    with suppress(OSError):
        call("prctl", _PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)


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
        call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


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


def _isolate(limits: dict[str, Any]) -> _Walls:
    """Namespaces, as far as they are given; goes on in them."""
    walls = _Walls()
    walls.isolated = _namespaces()
    if walls.isolated:
        walls.hidden = _hide(limits)
        _in_child()  # the first process of the new namespace: when it ends, so do all the others
        _in_child()  # signals do not reach a first process as they do others, so the code runs in the second
        os.setsid()  # its group holds none of the two
    return walls


def _confine(walls: _Walls, limits: dict[str, Any]) -> None:
    """What needs no rights: no new ones, only files that may be read, only calls that may be made."""
    _die_with_parent()  # giving up root forgot it
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    nothing = struct.pack("6I", 0, 0, 0, 0, 0, 0)
    call("capset", struct.pack("Ii", _CAPABILITIES_V3, 0), nothing)
    with suppress(OSError):
        writable = [".", mounts.SHARED_MEMORY] if walls.hidden else ["."]
        landlock.restrict([*_READABLE, *limits["python"]], _DEVICES, writable)
        walls.landlock = True
    with suppress(OSError):
        seccomp.install(walls.isolated, walls.hidden)
        walls.filtered = True


def main() -> NoReturn:
    """Take the code, give up rights, say which limits do not hold, become Python."""
    limits, report = json.loads(sys.argv[1]), int(sys.argv[2])
    code = sys.stdin.buffer.read()
    open_files = os.sysconf("SC_OPEN_MAX")
    _die_with_parent()
    linux = sys.platform == "linux"
    if linux:
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # when memory is short, this goes first
    walls = _isolate(limits) if linux else _Walls()
    Path(MAIN).write_bytes(code)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if linux:
        _give_up_capabilities()
    _give_up_root(limits["python"])
    _resources(limits, walls.isolated)
    if linux:
        _confine(walls, limits)
    os.write(report, json.dumps(walls.missing()).encode())
    os.close(report)
    os.closerange(3, open_files)
    os.execv(sys.executable, [sys.executable, "-I", "-X", "utf8", MAIN])


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RuntimeError) as error:  # nothing of the code has run
        sys.stderr.write(f"the sandbox could not be set up: {error}\n")
        os._exit(REFUSED)
