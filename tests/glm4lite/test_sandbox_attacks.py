"""Attacks on what lies outside the sandbox, in one program, run by root and by a user, with namespaces and without.

The same program also runs outside any sandbox: there the attacks marked `works` must succeed, or they would prove
nothing. What they aim at is open to everybody (mode 0777), so that only the sandbox can protect it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import glm4lite
from glm4lite.tools.sandbox import seccomp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has resource limits only")

USER = 54321  # an ordinary user's id, where the tests run as root
PYTHON = "/usr/bin/python3"  # one that everybody may run; the tests' own may lie in root's home


@dataclass(frozen=True)
class Attack:
    """`code` succeeds where it gets to its end; `works` says that it does for a user without a sandbox."""

    code: str
    works: bool = False
    open_without_namespaces: bool = False  # as the user is told before; no call can be limited by path then
    harmless_with_namespaces: bool = False  # reaches only what is the program's own there


def works(code: str, **more: bool) -> Attack:
    return Attack(code, works=True, **more)


ATTACKS = {
    "inherited files": Attack("first(os.fstat, range(3, 1000))"),  # first, while the program itself opened none
    # files by path
    "read": works("open(canary).read()"),
    "append": works("open(canary, 'a').write('x')"),
    "create": works("open(folder + '/new', 'w')"),
    "list": works("os.listdir(folder)"),
    "stat": works("os.stat(canary)", open_without_namespaces=True),
    "statx of a folder": works("os.stat(folder)", open_without_namespaces=True),
    "access": works("check(os.access(canary, os.R_OK))", open_without_namespaces=True),
    "readlink": works("os.readlink(folder + '/link')", open_without_namespaces=True),
    "statvfs": works("os.statvfs(folder)", open_without_namespaces=True),
    "chdir": works("os.chdir(folder); os.chdir(home)", open_without_namespaces=True),
    "chmod": works("os.chmod(canary, 0o600)"),
    "fchmodat2 of a path handle": works("sysc(452, os.open(canary, os.O_PATH), b'', 0o640, 0x1000)"),
    "chown": works("os.chown(canary, os.getuid(), -1)"),
    "lchown": works("os.lchown(folder + '/link', os.getuid(), -1)"),
    "utime": works("os.utime(canary, (1, 1))"),
    "utime of a handle": works("os.utime(folder + '/link', (1, 1), follow_symlinks=False)"),
    "setxattr": works("os.setxattr(canary, 'user.mark', b'x')"),
    "getxattr": works("os.listxattr(canary)"),
    "truncate": works("os.truncate(folder + '/long', 1)"),
    "rename": works("os.rename(folder + '/movable', folder + '/moved')"),
    "take in": works("os.rename(folder + '/takeable', 'taken')"),
    "hard link": works("os.link(canary, folder + '/hard')"),
    "hard link in the work folder": works("os.link(canary, 'hard')"),
    "symbolic link": works("os.symlink('x', folder + '/soft')"),
    "read through a link": works("os.symlink(canary, 'soft'); open('soft').read()"),
    "write through a link": works("os.symlink(canary, 'soft2'); open('soft2', 'a').write('x')"),
    "mkdir": works("os.mkdir(folder + '/made')"),
    "rmdir": works("os.rmdir(folder + '/empty')"),
    "unlink": works("os.unlink(folder + '/removable')"),
    "mkfifo": works("os.mkfifo(folder + '/fifo')"),
    "write into a pipe of others": works("os.write(os.open(folder + '/pipe', os.O_RDWR | os.O_NONBLOCK), b'x')"),
    "mknod of a disk": Attack("os.mknod('disk', 0o60600, os.makedev(8, 0))"),
    "up from the work folder": works("os.stat('..' + '/..' * 9 + canary)", open_without_namespaces=True),
    "chroot": Attack("os.chroot('.')"),
    "flock": works("import fcntl; fcntl.flock(open(canary), fcntl.LOCK_EX | fcntl.LOCK_NB)"),
    "lease": works("import fcntl; fcntl.fcntl(open('own', 'w'), 1024, 1)"),
    "dnotify": works("import fcntl; fcntl.fcntl(os.open('.', 0), 1026, 2)"),
    "inotify": works("C('inotify_add_watch', C('inotify_init'), folder.encode(), 0xFFF)"),
    "fanotify": Attack("C('fanotify_init', 0, 0)"),
    "name_to_handle_at": works("handle(canary)"),
    "open_by_handle_at": Attack("C('open_by_handle_at', -100, handle('.'), 0)"),
    "flags of a file": works("import fcntl; fcntl.ioctl(open(home + '/main.py'), 0x80086601, bytes(8))"),
    "the real /tmp": works("open('/tmp/' + mark, 'w'); os.unlink('/tmp/' + mark)"),
    "shared memory of others": works("open('/dev/shm/' + mark, 'r+').write('x')"),
    "write to Python": Attack("open(os.__file__, 'a')"),
    "chmod of Python": Attack("os.chmod(os.__file__, 0o777)"),
    "write beside Python": Attack("open(os.path.dirname(os.__file__) + '/x.py', 'w')"),
    "write to /usr": Attack("open('/usr/' + mark, 'w')"),
    "write to the root": Attack("open('/' + mark, 'w')"),
    "passwd": works("open('/etc/passwd').read()"),
    "hosts": works("open('/etc/hosts').read()"),
    "kernel log": Attack("open('/dev/kmsg').read(1)"),
    "memory device": Attack("open('/dev/mem', 'rb').read(1)"),
    "new terminal": works("os.open('/dev/ptmx', os.O_RDWR)"),
    "controlling terminal": Attack("os.open('/dev/tty', os.O_RDWR)"),
    "cgroup": Attack("os.mkdir('/sys/fs/cgroup/' + mark)"),
    "sysfs": works("os.listdir('/sys/kernel')"),
    # /proc
    "environ of a process": works("open(f'/proc/{victim}/environ', 'rb').read()"),
    "environ of init": Attack("open('/proc/1/environ', 'rb').read()"),
    "root of a process": works("open(f'/proc/{victim}/root{canary}').read()"),
    "memory of a process": works("open(f'/proc/{victim}/mem', 'r+b')"),
    "own memory": works("open('/proc/self/mem', 'r+b')"),
    "own handles": works("os.listdir('/proc/self/fd')"),
    "the old root": works("open(f'/proc/{os.getppid()}/root{canary}').read()"),
    "mounts": works("open('/proc/self/mountinfo').read()"),
    "core pattern": Attack("open('/proc/sys/kernel/core_pattern', 'w').write('x')"),
    "kernel symbols": works("open('/proc/kallsyms').readline()"),
    # other processes
    "signal": works("os.kill(victim, signal.SIGCONT)"),
    "signal to a group": works("os.kill(-victim, signal.SIGCONT)"),
    "tkill": works("sysc(number('tkill'), victim, signal.SIGCONT)"),
    "pidfd": works("signal.pidfd_send_signal(os.pidfd_open(victim), signal.SIGCONT)"),
    "signal by a file": works("import fcntl; fcntl.fcntl(socket.socketpair()[0], 8, victim)"),
    "ptrace": works("C('ptrace', 0x4206, victim, 0, 0)"),
    "process_vm_readv": works("read_memory(victim)"),
    "limits of a process": works("import resource; resource.prlimit(victim, resource.RLIMIT_CORE, (0, 0))"),
    "priority of a process": works("os.setpriority(os.PRIO_PROCESS, victim, 3)"),
    "priority of all of a user": Attack("check(not C('setpriority', 2, user, 5) and os.getpriority(0, victim) == 5)"),
    "affinity of a process": works("os.sched_setaffinity(victim, {0})"),
    "scheduling of a process": works("os.sched_setscheduler(victim, os.SCHED_BATCH, os.sched_param(0))"),
    "io priority of a process": works("sysc(number('ioprio_set'), 1, victim, (3 << 13) | 1)"),
    "kcmp": works("sysc(number('kcmp'), victim, victim, 1, 0, 0)"),
    # sockets
    "UNIX stream": works("connect(socket.AF_UNIX, socket.SOCK_STREAM, folder + '/agent')"),
    "UNIX datagram": works("socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x', folder + '/log')"),
    "UNIX datagram from a pair": works("pair().sendto(b'x', folder + '/log')"),
    "UNIX datagram by sendmsg": works("pair().sendmsg([b'x'], [], 0, folder + '/log')"),
    "abstract UNIX": works("connect(socket.AF_UNIX, socket.SOCK_STREAM, '\\0' + mark)"),
    "abstract UNIX from a pair": works("pair().connect('\\0' + mark + '-log')"),
    "TCP": works("connect(socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', port))"),
    "TCP server": works("socket.create_server(('127.0.0.1', 0))"),
    "UDP": works("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"),
    "TCP fast open": works("socket.socket().sendto(b'x', 0x20000000, ('127.0.0.1', port))"),
    "raw": Attack("socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    "ping": Attack("socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1)"),
    "packets": Attack("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "netlink": works("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).bind((0, 0))"),
    "vsock": Attack("socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).bind((socket.VMADDR_CID_ANY, 5123))"),
    "crypto": Attack("socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)"),
    "bluetooth": Attack("socket.socket(31, socket.SOCK_RAW, 1)"),
    "other families": Attack("first(lambda n: socket.socket(n, socket.SOCK_DGRAM), range(2, 46))"),
    "pairs of other families": Attack("first(lambda n: socket.socketpair(n, socket.SOCK_DGRAM), range(2, 46))"),
    # memory and queues that outlive a process
    "shmget": works("C('shmctl', C('shmget', 0, 4096, 0o1600), 0, None)"),
    "shmat of others": works("check(ctypes.c_int(libc.shmat(segment, 0, 0o10000)).value != -1)"),
    "semget": works("C('semctl', C('semget', 0, 1, 0o1600), 0, 0, None)"),
    "msgget": works("C('msgctl', C('msgget', 0, 0o1600), 0, None)"),
    "mq_open": works("C('mq_open', b'/' + mark.encode(), 0o102, 0o600, 0); C('mq_unlink', b'/' + mark.encode())"),
    "memfd": works("os.memfd_create('x')"),
    "program in memory": works("fd = os.memfd_create('x'); os.write(fd, open(sys.executable, 'rb').read())"),
    # the kernel
    "user namespace": works("C('unshare', 0x10000000)"),
    "mount namespace": Attack("C('unshare', 0x20000)"),
    "clone into namespaces": works("in_clone(0x10000011)"),
    "clone3": Attack("sysc(435, struct.pack('11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88) or os._exit(0)"),
    "setns": Attack("C('setns', os.open(f'/proc/{victim}/ns/net', 0), 0)"),
    "mount": Attack("C('mount', b'x', b'.', b'tmpfs', 0, None)"),
    "bind": Attack("C('mount', b'/', b'.', None, 4096, None)"),
    "remount": Attack("C('mount', b'x', b'/usr', None, 4096 | 32, None)"),
    "mount by handle": Attack("sysc(428, -100, b'/', 1)"),
    "umount": Attack("C('umount2', home.encode(), 2)"),
    "pivot_root": Attack("C('pivot_root', b'.', b'.')"),
    "io_uring": works("sysc(425, 4, bytes(120))"),
    "aio": works("sysc(number('io_setup'), 4, bytes(8))"),
    "bpf": Attack("sysc(number('bpf'), 0, struct.pack('5I', 2, 4, 8, 4, 0) + bytes(100), 120)"),
    "perf": Attack("sysc(number('perf_event_open'), struct.pack('2I', 1, 112) + bytes(104), 0, -1, -1, 0)"),
    "userfaultfd": works("sysc(number('userfaultfd'), 1)"),
    "keyring": works("sysc(number('keyctl'), 0, -3, 1)"),
    "key": works("sysc(number('add_key'), b'user', mark.encode(), b'x', 1, -3)"),
    "request_key": Attack("sysc(number('request_key'), b'user', mark.encode(), None, -3)"),
    "personality": works("C('personality', 0x40000)"),
    "kernel module": Attack("sysc(number('init_module'), b'x', 1, b'')"),
    "kexec": Attack("sysc(number('kexec_load'), 0, 0, None, 0)"),
    "swap": Attack("C('swapon', b'main.py', 0)"),
    "quota": Attack("C('quotactl', 0x80000700, None, 0, bytes(100))"),
    "accounting": Attack("C('acct', b'main.py')"),
    "kernel log by a call": Attack("C('klogctl', 3, bytes(16), 16)"),
    "restart": Attack("C('reboot', 0)"),
    "clock": Attack("time.clock_settime(time.CLOCK_REALTIME, time.time())"),
    "host name": Attack("socket.sethostname('x')"),
    "typing into a terminal": Attack("import fcntl; fcntl.ioctl(1, 0x5412, b'x')"),
    "other table of calls": Attack("sysc(0x40000000 + 39)"),
    "call newer than the list": Attack("check(refused_by(999) != errno.ENOSYS)"),
    # rights and what was inherited
    "become root": Attack("os.setuid(0)"),
    "become another group": Attack("os.setgroups([0])"),
    "capabilities": Attack("check(any(capabilities()))"),
    "new privileges": works("check(C('prctl', 39, 0, 0, 0, 0) == 0)"),
    "priority": Attack("os.nice(-5)"),
    "real-time": Attack("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    "more open files": Attack("import resource; resource.setrlimit(7, (1 << 20, 1 << 20))"),
    "core dumps": Attack("import resource; resource.setrlimit(4, (1, 1))"),
    "living on without the parent": works("C('prctl', 1, 0)", harmless_with_namespaces=True),
    "environment": works("os.environ['SECRET']"),
    "stdin": Attack("check(sys.stdin.read())"),
    "arguments of the parent": works("check(b'python' in open(f'/proc/{os.getppid()}/cmdline', 'rb').read())"),
}

PRELUDE = """
import ctypes, errno, json, os, platform, signal, socket, struct, sys, time
globals().update(json.loads(NAMES))
libc, home = ctypes.CDLL(None, use_errno=True), os.getcwd()
ARM = platform.machine() == "aarch64"

def number(name):
    return NUMBERS[name][ARM]

def check(good):
    if not good:
        raise PermissionError("no effect")

def raised(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def C(name, *arguments):
    return raised(getattr(libc, name)(*arguments))

def sysc(number, *arguments):
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return raised(libc.syscall(ctypes.c_long(number), *wide))

def refused_by(number):
    try:
        sysc(number)
    except OSError as error:
        return error.errno

def first(attempt, values):
    for value in values:
        try:
            return attempt(value)
        except OSError:
            pass
    raise PermissionError("none")

def pair():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]

def connect(family, kind, address):
    with socket.socket(family, kind) as client:
        client.settimeout(2)
        client.connect(address)
        client.sendall(b"x")

def handle(path):
    data = ctypes.create_string_buffer(struct.pack("II", 128, 0) + bytes(128))
    C("name_to_handle_at", -100, path.encode(), data, ctypes.byref(ctypes.c_int()), 0)
    return data

def read_memory(process):
    data = ctypes.create_string_buffer(8)
    place = struct.pack("QQ", ctypes.addressof(data), 8)
    try:
        sysc(number("process_vm_readv"), process, place, 1, struct.pack("QQ", 4096, 8), 1, 0)
    except OSError as error:
        if error.errno != errno.EFAULT:  # that address of the other holds nothing; it was looked at
            raise

def capabilities():
    data = ctypes.create_string_buffer(24)
    C("capget", struct.pack("Ii", 0x20080522, 0), data)
    return struct.unpack("6I", data)

def in_clone(flags):
    child = sysc(number("clone"), flags, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)

def attempt(name, code):
    try:
        exec(code, globals())
        result = "done"
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    os.write(1, (json.dumps([name, result]) + "\\n").encode())

for name, code in CODES.items():
    try:
        child = os.fork()
    except OSError:  # without namespaces the program cannot start any
        attempt(name, code)
        continue
    if child == 0:
        attempt(name, code)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps([name, f"ended with {status}"]), flush=True)
"""
NUMBERS = {
    "tkill": (200, 130),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "io_setup": (206, 0),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "process_vm_readv": (310, 270),
    "clone": (56, 220),
}

# Runs the program as a user (or not), with a sandbox (or not), on a system that lacks the calls named.
DRIVER = """
import json, os, struct, subprocess, sys
package, user, lacking, sandboxed = json.loads(sys.argv[1])
sys.path.insert(0, package)
from glm4lite.tools.sandbox import seccomp
from glm4lite.tools.sandbox.kernel import address, call
from glm4lite.tools.sandbox.process import Limits, run_python
if user is not None:
    os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
if lacking:  # as containers do
    numbers = {"unshare": (272, 97), "mount": (165, 40), "landlock": (444, 444), "seccomp": (157, 167)}
    of = int(os.uname().machine == "aarch64")
    code = b"".join(
        seccomp._if_equal(numbers[name][of], seccomp._return(seccomp._REFUSE)) for name in lacking if name != "seccomp")
    if "seccomp" in lacking:
        body = seccomp._argument(0) + seccomp._if_equal(22, seccomp._return(seccomp._REFUSE))
        code += seccomp._if_equal(numbers["seccomp"][of], body + seccomp._return(seccomp._ALLOW))
    code = seccomp._load(0) + code + seccomp._return(seccomp._ALLOW)
    kept, place = address(code)
    call("prctl", 38, 1, 0, 0, 0)
    call("prctl", 22, 2, struct.pack("HxxxxxxQ", len(code) // 8, place))
program = sys.stdin.read()
if sandboxed:
    outcome = run_python(program, Limits(seconds=60, cpu_seconds=30))
    print(json.dumps([outcome.output, outcome.failure, outcome.missing]))
else:
    with open("main.py", "w") as file:
        file.write(program)
    done = subprocess.run([sys.executable, "-I", "main.py"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        start_new_session=True)
    print(json.dumps([done.stdout, done.stderr, []]))
"""


@dataclass(frozen=True)
class Place:
    """A system: who runs glm4lite, and what it lacks."""

    user: int | None = None
    lacking: tuple[str, ...] = ()
    sandboxed: bool = True


ROOT, ORDINARY = Place(), Place(USER)
PLACES = {
    "root": ROOT,
    "user": ORDINARY,
    "root without namespaces": Place(None, ("unshare",)),
    "user without namespaces": Place(USER, ("unshare",)),
    "user without mounts": Place(USER, ("mount",)),
}


_libc = ctypes.CDLL(None)


class Outside:
    """What the attacks aim at, and how it looks."""

    def __init__(self, folder: Path, owner: int, stack: ExitStack) -> None:
        self.folder, self.mark = folder, folder.name
        self.received = list[bytes]()
        for name in ("canary", "long", "movable", "takeable", "removable"):
            (folder / name).write_text("my secret")
        (folder / "empty").mkdir()
        (folder / "link").symlink_to("canary")
        os.mkfifo(folder / "pipe")
        self.shared = Path("/dev/shm") / self.mark
        self.shared.write_text("mine")
        stack.callback(self.shared.unlink)
        self._listen(stack, socket.SOCK_STREAM, str(folder / "agent"))
        self._listen(stack, socket.SOCK_DGRAM, str(folder / "log"))
        self._listen(stack, socket.SOCK_STREAM, "\0" + self.mark)
        self._listen(stack, socket.SOCK_DGRAM, f"\0{self.mark}-log")
        self.port = self._listen(stack, socket.SOCK_STREAM, ("127.0.0.1", 0))[1]
        for path in [folder, self.shared, *folder.iterdir()]:
            os.chown(path, owner, owner, follow_symlinks=False)
            if not path.is_symlink():
                path.chmod(0o777)
        identity: dict[str, Any] = {"user": owner, "group": owner, "extra_groups": []} if os.geteuid() == 0 else {}
        self.victim = subprocess.Popen(["sleep", "100"], start_new_session=True, env={"SECRET": "x"}, **identity)
        self.segment = _libc.shmget(0, 4096, 0o1666)
        stack.callback(_libc.shmctl, self.segment, 0, None)
        stack.callback(self.victim.wait)
        stack.callback(self.victim.kill)

    def _listen(self, stack: ExitStack, kind: int, address: str | tuple[str, int]) -> tuple[str, int]:
        server = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX, kind)
        stack.callback(server.close)
        server.bind(address)
        if kind == socket.SOCK_STREAM:
            server.listen()
        server.setblocking(False)
        self._servers = [*getattr(self, "_servers", []), server]
        return server.getsockname()

    def names(self, owner: int) -> dict[str, object]:
        canary = str(self.folder / "canary")
        names: dict[str, object] = {"folder": str(self.folder), "canary": canary, "mark": self.mark, "port": self.port}
        return names | {"victim": self.victim.pid, "user": owner, "segment": self.segment}

    def looks(self) -> dict[str, object]:
        """All that an attack might have changed."""
        kept: dict[str, object] = {}
        for path in [self.folder, self.shared, *sorted(self.folder.iterdir())]:
            seen = path.lstat()
            kept[str(path)] = (
                seen.st_mode,
                seen.st_uid,
                seen.st_mtime_ns,
                seen.st_ctime_ns,
                seen.st_nlink,
                seen.st_size,
            )
        status = Path(f"/proc/{self.victim.pid}/status").read_text()
        kept["affinity"] = [line for line in status.splitlines() if line.startswith("Cpus_allowed:")]
        kept["limits"] = Path(f"/proc/{self.victim.pid}/limits").read_text()
        kept["priority"] = os.getpriority(os.PRIO_PROCESS, self.victim.pid)
        kept["shared memory"] = [file.name for file in Path("/dev/shm").iterdir() if self.mark in file.name]
        kept["/tmp"] = os.path.exists(f"/tmp/{self.mark}")
        for kind in ("shm", "sem", "msg"):
            lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
            kept[kind] = [line for line in lines if str(USER) in line.split() or "65533" in line.split()]
        for index, server in enumerate(self._servers):
            with suppress(BlockingIOError):
                kept[f"received {index}"] = server.accept() if server.type == socket.SOCK_STREAM else server.recv(10)
        return kept


@dataclass
class Run:
    results: dict[str, str]
    missing: tuple[str, ...]
    before: dict[str, object]
    after: dict[str, object]


BASE = ("__init__", "errors", "owned_folder", "processes", "sentences", "whole_file")  # what the sandbox imports of it


def run_in(place: Place, program: str, folder: Path) -> tuple[str, str, tuple[str, ...]]:
    """The program's output, how it failed, and what was not limited."""
    package = folder / "package"
    if not package.exists():
        ignore = shutil.ignore_patterns("__pycache__")
        source, target = Path(glm4lite.__file__).parent, package / "glm4lite"
        shutil.copytree(source / "tools" / "sandbox", target / "tools" / "sandbox", ignore=ignore)
        (target / "base").mkdir()
        names = (
            "__init__.py",
            "tools/__init__.py",
            *(f"base/{name}.py" for name in BASE),
        )
        for name in names:
            shutil.copy(source / name, target / name)
        shutil.copytree(Path(psutil.__file__).parent, package / "psutil", ignore=ignore)
    arguments = json.dumps([str(package), place.user if os.geteuid() == 0 else None, place.lacking, place.sandboxed])
    work = folder / "work"
    work.mkdir(exist_ok=True)
    work.chmod(0o777)
    done = subprocess.run(
        [PYTHON, "-c", DRIVER, arguments],
        input=program,
        capture_output=True,
        text=True,
        cwd=work,
        env={"PATH": "/usr/bin:/bin", "SECRET": "x"},
        timeout=100,
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    output, failure, missing = json.loads(done.stdout)
    return output, failure, tuple(missing)


@contextmanager
def open_folder() -> Iterator[Path]:
    """Like tmp_path, but other users may enter."""
    folder = Path(tempfile.mkdtemp(prefix="outside-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def attacked(place: Place) -> Run:
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"no {PYTHON}, which another user could run")
    owner = USER if os.geteuid() == 0 else os.geteuid()
    codes = {name: attack.code for name, attack in ATTACKS.items() if place.sandboxed or attack.works}
    with open_folder() as folder, ExitStack() as stack:
        target = folder / f"target-{os.urandom(6).hex()}"
        target.mkdir()
        outside = Outside(target, owner, stack)
        names = json.dumps(outside.names(owner))
        program = f"NAMES = {names!r}\nCODES = {codes!r}\nNUMBERS = {NUMBERS!r}\n{PRELUDE}"
        before = outside.looks()
        output, failure, missing = run_in(place, program, folder)
        results = dict(json.loads(line) for line in output.splitlines())
        if place.sandboxed:
            assert failure == "", output
        return Run(results, missing, before, outside.looks())


_runs = dict[str, Run]()


def run_of(name: str) -> Run:
    """Each place is attacked once."""
    if name not in _runs:
        if name.startswith("root") and os.geteuid() != 0:
            pytest.skip("the tests do not run as root")
        _runs[name] = attacked(PLACES[name] if name != "nowhere" else Place(USER, sandboxed=False))
    return _runs[name]


def test_the_attacks_work_without_a_sandbox() -> None:
    results = run_of("nowhere").results
    assert {name: results[name] for name, attack in ATTACKS.items() if attack.works and results[name] != "done"} == {}


@pytest.mark.parametrize("place", PLACES)
def test_every_attack_fails_and_nothing_outside_is_changed(place: str) -> None:
    run = run_of(place)

    def may_succeed(attack: Attack) -> bool:
        told = "seeing which files exist" in run.missing and attack.open_without_namespaces
        return told or ("without namespaces" not in place and attack.harmless_with_namespaces)

    done = {name for name in ATTACKS if run.results[name] == "done"}
    assert {name for name in done if not may_succeed(ATTACKS[name])} == set()
    assert run.after == run.before


@pytest.mark.parametrize("place", ["root", "user"])
def test_with_namespaces_nothing_is_missing(place: str) -> None:
    assert run_of(place).missing == ()


@pytest.mark.parametrize(
    ("lacking", "missing"),
    [
        (("unshare",), {"space on disk", "seeing which files exist"}),
        (("mount",), {"space on disk", "seeing which files exist"}),
        (("landlock",), set()),
        (("seccomp",), {"calls of the kernel"}),
        (("unshare", "landlock"), {"space on disk", "seeing which files exist", "reading files", "changing files"}),
        (
            ("unshare", "seccomp"),
            {"space on disk", "seeing which files exist", "network", "changing files", "calls of the kernel"},
        ),
    ],
)
def test_what_a_system_lacks_is_told(lacking: tuple[str, ...], missing: set[str]) -> None:
    with open_folder() as folder:
        output, failure, told = run_in(Place(USER, lacking), "print(1)", folder)
    assert (output, failure) == ("1\n", "")
    assert set(told) == missing


DEEP = """
import os
open("file", "w"); os.mkdir("closed"); open("closed/file", "w"); os.symlink("/usr", "link"); os.mkfifo("fifo")
os.chmod("closed", 0) if CHMOD else None
here = os.open(".", os.O_RDONLY)
for depth in range(DEPTH):
    os.mkdir("d", 0o700 if depth % 2 else 0o300, dir_fd=here)
    there = os.open("d", os.O_PATH, dir_fd=here)
    os.close(here)
    here = there
print(os.getcwd())
"""


@pytest.mark.parametrize("place", PLACES)
def test_a_work_folder_of_any_shape_is_removed(place: str) -> None:
    """rmtree fails on a thousand folders in each other, and on those without rights."""
    if place.startswith("root") and os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    deep = place in ("root", "user", "user without namespaces")  # a disk takes its time; once is enough
    program = DEEP.replace("CHMOD", str("without" not in place)).replace("DEPTH", "1100" if deep else "10")
    with open_folder() as folder:
        output, failure, _ = run_in(PLACES[place], program, folder)
    assert failure == "", output
    assert not Path(output.strip()).exists()


def test_files_and_shared_memory_have_one_limit_of_size_and_number() -> None:
    program = """
import os
with open("sparse", "wb") as file:
    try:
        file.truncate(1 << 40)
    except OSError as error:
        print(error.strerror)
written = 0
try:
    for n in range(50):
        with open(f"{n}" if n % 2 else f"/dev/shm/{n}", "wb") as file:
            written += file.write(bytes(4 << 20))
except OSError as error:
    print(written >> 20, error.strerror)
for n in range(50):
    for name in (f"{n}", f"/dev/shm/{n}"):
        if os.path.exists(name):
            os.unlink(name)
try:
    for n in range(10000):
        open(f"f{n}", "w").close()
except OSError as error:
    print(n, error.strerror)
"""
    with open_folder() as folder:
        output, failure, _ = run_in(Place(USER), program, folder)
    assert failure == "", output
    sparse, size, number = output.splitlines()
    assert sparse == "File too large"
    assert 40 <= int(size.split()[0]) <= 64
    assert "No space left" in size
    assert int(number.split()[0]) < 4096


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="int 0x80 is of x86")
@pytest.mark.parametrize("place", ["user", "user without namespaces"])
def test_the_calls_of_another_architecture_end_the_program(place: str) -> None:
    """Their numbers mean others; 20 is getpid of 32-bit programs, writev of 64-bit ones."""
    program = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("b814000000cd80c3"))
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""
    with open_folder() as folder:
        output, failure, _ = run_in(PLACES[place], program, folder)
    assert output == ""
    assert "SIGSYS" in failure


def filtered(program: bytes, machine: str, number: int, *arguments: int) -> int:
    """What a filter returns for a call: the instructions that seccomp.py uses, interpreted."""
    data = struct.pack("iIQ6Q", number, seccomp._AUDIT[machine], 0, *(list(arguments) + [0] * 6)[:6])
    word, place = 0, 0
    while True:
        operation, true, false, value = struct.unpack_from("HBBI", program, 8 * place)
        place += 1
        if operation == seccomp._RETURN:
            return value
        if operation == seccomp._LOAD:
            (word,) = struct.unpack_from("I", data, value)
        elif operation == seccomp._AND:
            word &= value
        else:
            tests = {seccomp._EQUAL: word == value, seccomp._GREATER: word > value, seccomp._ANY_BIT: word & value}
            place += true if tests[operation] else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("isolated", "hidden"), [(True, True), (True, False), (False, False)])
def test_the_filter_refuses_what_it_lists_and_lets_python_run(machine: str, isolated: bool, hidden: bool) -> None:
    of = ("x86_64", "aarch64").index(machine)
    program = seccomp.program(machine, isolated, hidden, process=77)
    lists = seccomp._ALWAYS + ("" if hidden else f", {seccomp._CHANGE_FILES}, {seccomp._REACH_SOCKETS}")
    lists += "" if isolated else f", {seccomp._REACH_PROCESSES}"
    for name, *numbers in (entry.split() for entry in lists.split(",")):
        if numbers[of] != "-":
            answer = filtered(program, machine, int(numbers[of]), 1, 1)
            assert answer == seccomp._REFUSE or (name == "socket" and hidden), name
    needed = {"read": (0, 63), "write": (1, 64), "openat": (257, 56), "mmap": (9, 222), "execve": (59, 221)}
    needed |= {"exit_group": (231, 94), "futex": (202, 98), "getrandom": (318, 278), "clone": (56, 220)}
    for name, both in needed.items():
        assert filtered(program, machine, both[of]) == seccomp._ALLOW, name
    kill = (62, 129)[of]
    assert filtered(program, machine, kill, 77, 9) == seccomp._ALLOW
    assert (filtered(program, machine, kill, 78, 9) == seccomp._ALLOW) == isolated
    assert filtered(program, "aarch64" if of == 0 else "x86_64", 1) == seccomp._KILL


ORDINARY_PROGRAM = """
import asyncio, ctypes, decimal, locale, os, random, shutil, sqlite3, ssl, subprocess, sys, tempfile, threading, time
import zoneinfo, datetime, math, statistics, json, csv, re, hashlib, urllib.request, socket, mmap, pty

async def main():
    return await asyncio.gather(asyncio.to_thread(lambda: 1) if THREADS else asyncio.sleep(0, 1), asyncio.sleep(0, 2))

assert asyncio.run(main()) == [1, 2]
with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile() as file:
    base = sqlite3.connect(folder + "/x.db")
    base.execute("create table t (a)"); base.execute("insert into t values (3)"); base.commit()
    assert base.execute("select a from t").fetchone() == (3,)
    shutil.copyfile(folder + "/x.db", "y.db"); os.rename("y.db", "z.db"); os.remove("z.db")
assert decimal.Decimal("0.1") * 3 == decimal.Decimal("0.3")
assert datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Lisbon")).utcoffset().seconds == 3600
assert time.localtime() and ssl.create_default_context() and hashlib.sha256(b"x").hexdigest()
locale.setlocale(locale.LC_ALL, "")
assert mmap.mmap(-1, 4096) and ctypes.CDLL(None).getpid() == os.getpid()
left, right = socket.socketpair(); left.send(b"x"); assert right.recv(1) == b"x"
assert os.cpu_count() >= 1 and os.urandom(4) and not sys.stdout.isatty()
if THREADS:
    threads = [threading.Thread(target=time.sleep, args=(0,)) for _ in range(4)]
    [thread.start() for thread in threads]; [thread.join() for thread in threads]
    command = [sys.executable, "-c", "print(input())"]
    assert subprocess.run(command, input="x", capture_output=True, text=True, check=True).stdout.strip() == "x"
if HIDDEN:
    import concurrent.futures, multiprocessing
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        assert list(pool.map(abs, [-1, -2])) == [1, 2]
    with multiprocessing.Manager() as manager:
        assert manager.list([1])[0] == 1
    shutil.copy2(sys.executable, "copy"); os.chmod("copy", 0o700); os.utime("copy", (1, 1))
    assert subprocess.run("echo a | tr a b", shell=True, capture_output=True).stdout.strip() == b"b"
print("fine")
"""


@pytest.mark.parametrize("place", PLACES)
def test_ordinary_programs_run(place: str) -> None:
    if place.startswith("root") and os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    program = ORDINARY_PROGRAM.replace("THREADS", str("without namespaces" not in place))
    program = program.replace("HIDDEN", str("without" not in place))
    with open_folder() as folder:
        output, failure, _ = run_in(PLACES[place], program, folder)
    assert (output, failure) == ("fine\n", "")
