"""The inside of the sandbox: a script that confines its own process for good, then runs one program.

Started by `sandbox.py`, never imported by it; also the confinement of the grading worker. Standard library
only, and nothing of this package, so that it starts quickly and runs on any Python from 3.11 on.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import platform
import signal
import struct
import sys
import types
from typing import Any

try:
    import resource
except ImportError:  # not a Unix
    resource = None

# System calls that a computing process of one thread needs: name -> (x86_64, aarch64; None where absent).
# Whatever is not listed here or below is refused: processes, threads, programs, sockets, signals to others,
# changes of files, mounts, tracing, shared memory.
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "preadv": (295, 69),
    "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "fstat": (5, 80), "newfstatat": (262, 79),
    "stat": (4, None), "lstat": (6, None), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "getdents64": (217, 61), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None),
    "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "socketpair": (53, 199), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "msync": (26, 227), "mincore": (27, 232),
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "rseq": (334, 293),
    "membarrier": (324, 283), "set_tid_address": (218, 96), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "pause": (34, None), "alarm": (37, None), "setitimer": (38, 103), "getitimer": (36, 102),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "sysinfo": (99, 179),
    "uname": (63, 160), "getrandom": (318, 278), "getcpu": (309, 168), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "getrlimit": (97, 163), "arch_prctl": (158, None), "exit": (60, 93), "exit_group": (231, 94),
    "statfs": (137, 43), "fstatfs": (138, 44), "fadvise64": (221, 223), "umask": (95, 166), "getpriority": (140, 141),
}  # fmt: skip
# Allowed with some arguments only: name -> (x86_64, aarch64), argument, values.
_OPENS = {"open": ((2, None), 1), "openat": ((257, 56), 2)}  # to read; the argument holds the flags
_CHOSEN = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030)),  # duplicate a descriptor, read and set its flags
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # is it a terminal, blocking, inherited
    "prlimit64": ((302, 261), 0, (0,)),  # its own limits, which it can only lower
}
_TGKILL = (234, 131)  # signals to itself, as abort() sends them
_ARCHS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # place in the pairs above, AUDIT_ARCH
_WRITING = 0o1103  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_EPERM, _EROFS = 1, 30
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUALS, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16  # offsets in seccomp_data

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_NAMESPACES, _NEW_USER = 0x40000000 | 0x08000000, 0x10000000  # network and IPC; user, where not root
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_NOBODY = 65534
_CAPABILITIES_3 = 0x20080522
_MAX_ERROR = 500


def confine(limits: dict[str, int], layers: tuple[str, ...], is_tied: bool) -> list[str]:
    """Confine this process for good and return the names of the layers that hold; OSError without seccomp.

    A tied process is killed with the thread that started it.
    The filter of system calls and the limits are always applied. The other layers are second walls behind
    it, each used where the system has it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    held = []
    if "namespaces" in layers and _leave_namespaces(libc):
        held.append("namespaces")
    if "uid" in layers and _drop_root(libc):
        held.append("uid")
    if is_tied:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the change of user, which clears it
    _set_limits(limits)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs is refused")
    if "landlock" in layers and _restrict_reading(libc):
        held.append("landlock")
    _filter_calls(libc)
    return [*held, "seccomp", "limits"]


def _leave_namespaces(libc: Any) -> bool:
    """No network interface and no System V memory to share; an ordinary user needs a user namespace for it."""
    return libc.unshare(_NAMESPACES if os.geteuid() == 0 else _NAMESPACES | _NEW_USER) == 0


def _drop_root(libc: Any) -> bool:
    """Root becomes nobody where nobody can read this Python, else root without capabilities."""
    if os.geteuid() != 0:
        return False
    try:
        if _is_public(os.__file__) and all(_is_public(path) for path in sys.path if os.path.exists(path)):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
            return True
    except OSError:
        pass  # a container without these capabilities has none to drop
    libc.capset(struct.pack("Ii", _CAPABILITIES_3, 0), bytes(24))
    return False


def _is_public(path: str) -> bool:
    path = os.path.realpath(path)
    parents = [path[:place] or "/" for place in range(len(path)) if path[place] == "/"]
    return bool(os.stat(path).st_mode & 0o004) and all(os.stat(parent).st_mode & 0o001 for parent in parents)


def _set_limits(limits: dict[str, int]) -> None:
    if resource is None:
        return
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (most, most))


def _restrict_reading(libc: Any) -> bool:
    """Landlock: read Python and the system's libraries, nothing else; write and connect nowhere."""
    abi = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < 1:
        return False
    rights = (1 << 13) - 1 if abi == 1 else (1 << 14) - 1 if abi == 2 else (1 << 15) - 1
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    for path in _readable_paths():
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        rule = struct.pack("=Qi", allowed, handle)
        libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, ctypes.c_uint32(0))
        os.close(handle)
    restricted = libc.syscall(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)) == 0
    os.close(ruleset)
    return restricted


def _readable_paths() -> list[str]:
    system = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom")
    python = (sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path)
    found = {os.path.realpath(path) for path in (*system, *python) if path and os.path.exists(path)}
    return sorted(found - {"/"})


def _filter_calls(libc: Any) -> None:
    """Install the filter of system calls; it outlives everything the process can do."""
    if sys.platform != "linux" or platform.machine() not in _ARCHS or sys.maxsize < 2**32:
        raise OSError(f"no filter of system calls for {sys.platform} on {platform.machine()}")
    program = _filter_program(*_ARCHS[platform.machine()], os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    if libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp is refused")


def _filter_program(place: int, arch: int, pid: int) -> bytes:
    """The filter as BPF: kill under another ABI, allow what is listed, refuse the rest with EPERM."""
    code = [_op(_LOAD, _ARCH), _op(_EQUALS, arch, 1, 0), _op(_RETURN, _KILL), _op(_LOAD, _NR)]
    for numbers in _ALLOWED.values():
        if numbers[place] is not None:
            code += [_op(_EQUALS, numbers[place], 0, 1), _op(_RETURN, _ALLOW)]
    for numbers, argument in _OPENS.values():
        flags = [_op(_LOAD, _ARGS + 8 * argument), _op(_ANY_BIT, _WRITING, 0, 1)]
        code += _when(numbers[place], [*flags, _op(_RETURN, _REFUSE | _EROFS), _op(_RETURN, _ALLOW)])
    for numbers, argument, values in [*_CHOSEN.values(), (_TGKILL, 0, (pid,))]:
        tests = [op for value in values for op in (_op(_EQUALS, value, 0, 1), _op(_RETURN, _ALLOW))]
        body = [_op(_LOAD, _ARGS + 8 * argument), *tests, _op(_RETURN, _REFUSE | _EPERM)]
        code += _when(numbers[place], body)
    return b"".join([*code, _op(_RETURN, _REFUSE | _EPERM)])


def _when(number: int | None, body: list[bytes]) -> list[bytes]:
    return [] if number is None else [_op(_EQUALS, number, 0, len(body)), *body]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _main() -> None:
    """Read a job from stdin, confine this process, run the job's program and report once on stdout."""
    job = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    sys.dont_write_bytecode = True
    try:
        layers = confine(job["limits"], tuple(job["layers"]), is_tied=True)
    except OSError as error:
        _report(answer, {"nonce": job["nonce"], "status": "unavailable", "error": str(error)})
        return
    _report(answer, {"nonce": job["nonce"], "status": "ready", "layers": layers})
    status, error = _run(job["parts"])
    _report(answer, {"nonce": job["nonce"], "status": status, "error": error})
    os._exit(0)  # nothing that the program left behind runs


def _run(parts: list[tuple[str, str]]) -> tuple[str, str]:
    """Run the sources one after the other in one namespace, each under its own module name."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    try:
        for name, source in parts:
            sys.modules[name] = main
            main.__dict__["__name__"] = name
            exec(compile(source, "<program>", "exec", dont_inherit=True), main.__dict__)
    except BaseException as error:  # the program's own: SystemExit before the tests is a failure, too
        return "failed", f"{type(error).__name__}: {str(error)[:_MAX_ERROR]}"
    return "passed", ""


def _report(answer: int, reply: dict[str, Any]) -> None:
    os.write(answer, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    _main()
