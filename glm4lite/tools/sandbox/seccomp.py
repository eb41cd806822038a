"""Which calls the kernel takes from the process: seccomp(2), classic BPF over a call's number and arguments.

Refused is what neither Landlock nor a namespace limits, what only an administrator needs, and what is newer than this
list. Where the file system is not hidden, also all that changes a file by its path or reaches another process.
"""

import errno
import os
import struct
import sys
from collections.abc import Iterable

if sys.platform == "win32":
    raise ImportError("Windows has none of the sandbox's calls")

from glm4lite.tools.sandbox.kernel import address, call

# A call's number on x86_64 and on aarch64; "-" where it does not exist.
_ALWAYS = """
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429, fsopen 430 430,
fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, unshare 272 97, setns 308 268,
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448,
kcmp 312 272, pidfd_getfd 438 438, perf_event_open 298 241, bpf 321 280, userfaultfd 323 282, add_key 248 217,
request_key 249 218, keyctl 250 219, kexec_load 246 104, kexec_file_load 320 294, init_module 175 105,
finit_module 313 273, delete_module 176 106, reboot 169 142, swapon 167 224, swapoff 168 225, acct 163 89,
quotactl 179 60, quotactl_fd 443 443, syslog 103 116, vhangup 153 58, iopl 172 -, ioperm 173 -, modify_ldt 154 -,
settimeofday 164 170, clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161,
setdomainname 171 162, personality 135 92, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
io_setup 206 0, io_submit 209 2, name_to_handle_at 303 264, open_by_handle_at 304 265, fanotify_init 300 262,
fanotify_mark 301 263, inotify_init 253 -, inotify_init1 294 26, inotify_add_watch 254 27, memfd_create 319 279,
memfd_secret 447 447, vmsplice 278 75, shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193,
semctl 66 191, semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180,
mq_unlink 241 181, set_mempolicy 238 237, mbind 237 235, migrate_pages 256 238, move_pages 279 239,
set_mempolicy_home_node 450 450, remap_file_pages 216 234
"""
_CHANGE_FILES = """
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54,
utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, truncate 76 45
"""
_ATTRIBUTES = """
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13
"""
_REACH_PROCESSES = """
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, tkill 200 130, pidfd_open 434 434, pidfd_send_signal 424 424,
setpriority 141 140, ioprio_set 251 30
"""
_REACH_SOCKETS = "socket 41 198, connect 42 203, bind 49 200, listen 50 201"
_OF_ONE_PROCESS = """
kill 62 129, tgkill 234 131, prlimit64 302 261, sched_setaffinity 203 122, sched_setscheduler 144 119,
sched_setparam 142 118, sched_setattr 314 274
"""
_NEWEST = 456  # futex_requeue of Linux 6.7; programs that use a newer call expect that it may be missing

# Asking about a terminal, how many bytes wait, not to block, to close on exec.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Signals and notices by way of a file: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY.
_FCNTLS = (8, 10, 15, 1024, 1026)
_NEW_NAMESPACES = 0x7E020000  # the flags of clone
_AF_UNIX, _SOCK_STREAM = 1, 1  # importing `socket` would take a third of the start-up
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _MODE_FILTER = 1, 22, 2

_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # what a filter returns
_REFUSE = _ERRNO | errno.EPERM
_LOAD, _AND, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06  # BPF's instructions
_NUMBER, _ARCHITECTURE, _ARGUMENTS = (
    0,
    4,
    16,
)  # places in struct seccomp_data; the lower half of an argument comes first
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def install(isolated: bool, hidden: bool) -> None:
    """Filters the calls of this process from now on, as `program` says; OSError where that is not possible."""
    machine = os.uname().machine
    if machine not in _AUDIT or sys.maxsize < 1 << 32 or sys.byteorder != "little":
        raise OSError(errno.ENOSYS, f"there is no list of system calls for {machine}")
    code = program(machine, isolated, hidden, os.getpid())
    kept, place = address(code)
    call("prctl", _PR_SET_SECCOMP, _MODE_FILTER, struct.pack("HxxxxxxQ", len(code) // 8, place))
    del kept


def program(machine: str, isolated: bool, hidden: bool, process: int) -> bytes:
    """The filter. `isolated`: the process has its own namespaces; `hidden`: and a file system of its own."""
    of = {"x86_64": 0, "aarch64": 1}[machine]

    def numbers(calls: str) -> list[int]:
        found = (entry.split()[1 + of] for entry in calls.split(","))
        return [int(number) for number in found if number != "-"]

    def refuse(calls: str, answer: int = _REFUSE) -> bytes:
        return b"".join(_if_equal(number, _return(answer)) for number in numbers(calls))

    def check(calls: str, *body: bytes) -> bytes:
        return b"".join(_if_equal(number, b"".join(body)) for number in numbers(calls))

    code = _load(_ARCHITECTURE) + _unless_equal(_AUDIT[machine], _return(_KILL)) + _load(_NUMBER)
    code += _if(_GREATER, _NEWEST, _return(_ERRNO | errno.ENOSYS))  # also the calls of x32, whose numbers are huge
    code += refuse(_ALWAYS) + refuse("clone3 435 435", _ERRNO | errno.ENOSYS)  # its flags lie in memory: clone instead
    code += check("clone 56 220", _argument(0), _if(_ANY_BIT, _NEW_NAMESPACES, _return(_REFUSE)), _return(_ALLOW))
    code += check("ioctl 16 29", _only(1, _IOCTLS, _ERRNO | errno.ENOTTY))
    code += check("fcntl 72 25", _argument(1), *(_if_equal(one, _return(_REFUSE)) for one in _FCNTLS), _return(_ALLOW))
    if hidden:
        code += check("socket 41 198", _only(0, [_AF_UNIX])) + check("socketpair 53 199", _only(0, [_AF_UNIX]))
    else:
        code += refuse(_CHANGE_FILES) + refuse(_ATTRIBUTES, _ERRNO | errno.ENOTSUP) + refuse(_REACH_SOCKETS)
        # One of a pair of datagrams could still send to any path.
        kind = _argument(1) + struct.pack("HBBI", _AND, 0, 0, 0xF)
        stream = kind + _unless_equal(_SOCK_STREAM, _return(_REFUSE))
        code += check("socketpair 53 199", stream, _only(0, [_AF_UNIX]))
    if not isolated:
        code += refuse(_REACH_PROCESSES) + check(_OF_ONE_PROCESS, _only(0, [0, process]))
        code += check("prctl 157 167", _argument(0), _if_equal(_PR_SET_PDEATHSIG, _return(_REFUSE)), _return(_ALLOW))
    return code + _return(_ALLOW)


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", _LOAD, 0, 0, offset)


def _argument(index: int) -> bytes:
    return _load(_ARGUMENTS + 8 * index)


def _return(answer: int) -> bytes:
    return struct.pack("HBBI", _RETURN, 0, 0, answer)


def _if(test: int, value: int, body: bytes) -> bytes:
    """`body` where the loaded word passes the test, else what comes after it."""
    return struct.pack("HBBI", test, 0, len(body) // 8, value) + body


def _if_equal(value: int, body: bytes) -> bytes:
    return _if(_EQUAL, value, body)


def _unless_equal(value: int, body: bytes) -> bytes:
    return struct.pack("HBBI", _EQUAL, len(body) // 8, 0, value) + body


def _only(index: int, allowed: Iterable[int], answer: int = _REFUSE) -> bytes:
    """Allows the call where its argument is one of these."""
    return _argument(index) + b"".join(_if_equal(value, _return(_ALLOW)) for value in allowed) + _return(answer)
