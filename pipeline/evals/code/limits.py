"""What a process may no longer do once `apply` returned: the kernel's limits, not Python's.

Only the standard library is imported here: this file runs inside the sandboxed process.

Sources: man pages landlock(7), seccomp(2), setrlimit(2); the kernel's uapi/linux/landlock.h and
uapi/linux/seccomp.h.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys

NEW_PRIVILEGES_OFF = 38  # prctl PR_SET_NO_NEW_PRIVS
DUMPABLE = 4  # prctl PR_SET_DUMPABLE
LANDLOCK = {"create": 444, "add": 445, "restrict": 446}  # the same on every architecture
PATH_BENEATH = 1
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute (also what maps a library), read a file, list a folder
WRITE_FILE = 1 << 1
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights over files that a version of Landlock knows, by the first version that does."""
CLONE_THREAD = 0x10000
DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "sendto": (44, 206), "sendmsg": (46, 211),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "prlimit64": (302, 261),
    "setrlimit": (160, 164),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "reboot": (169, 142), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "memfd_create": (319, 279),
    # Landlock leaves modes, owners, times and attributes of files alone.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setuid": (105, 146),
    "setgid": (106, 144), "setresuid": (117, 147), "setresgid": (119, 149),
}  # fmt: skip
"""System calls that fail with EPERM, with their numbers on x86_64 and aarch64."""
CLONE, CLONE3 = (56, 220), (435, 435)
SECCOMP = (317, 277)
AUDIT = (0xC000003E, 0xC00000B7)
X32_BIT = 0x40000000
# Instructions of classic BPF, as (code, jump if true, jump if false, constant).
LOAD, EQUAL, SET, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000


class GuardError(Exception):
    """A guard cannot be had on this machine."""


def apply(
    scratch: str, *, cpu_seconds: int, memory_bytes: int, file_bytes: int, full: bool
) -> list[str]:
    """Give up, for good, all that running a benchmark's answer does not need.

    Args:
        scratch: the one folder that can be written to.
        cpu_seconds: processor time, after which the kernel ends the process.
        memory_bytes: of address space.
        file_bytes: of the largest file.
        full: fail where file or system call guards are missing, instead of going without.

    Returns:
        The guards that hold: always `limits`, and `files`, `system calls`.

    Raises:
        GuardError: when `full` and the kernel does not offer one of them.
    """
    set_limits(cpu_seconds, memory_bytes, file_bytes)
    held = ["limits"]
    for name, guard in (("files", lambda: confine_files(scratch)), ("system calls", filter_calls)):
        try:
            guard()
            held.append(name)
        except GuardError:
            if full:
                raise
    return held


def set_limits(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    """Processor time, memory, file size, open files, processes (not for root) and core dumps."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def confine_files(scratch: str) -> None:
    """Landlock: read where Python and the system's libraries are, write below `scratch` alone.

    Where Landlock also knows the network (ABI 4), no TCP port can be bound or connected to.
    """
    if sys.platform != "linux":
        raise GuardError("only Linux can confine files (Landlock)")
    call = _system_call()
    version = call(LANDLOCK["create"], None, 0, 1)
    if version < 1:
        raise GuardError("this kernel has no Landlock (Linux 5.13 and later, unless disabled)")
    known = max(first for first in FILE_RIGHTS if first <= version)
    rights = FILE_RIGHTS[known]
    rules = struct.pack("=QQ", rights, 3) if version >= 4 else struct.pack("=Q", rights)
    ruleset = call(LANDLOCK["create"], rules, len(rules), 0)
    if ruleset < 0:
        raise GuardError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    readable = [sys.base_prefix, sys.prefix, *sys.path, "/usr", "/lib", "/lib64", "/etc"]
    allowed = [(path, READ) for path in readable]
    allowed += [("/dev/null", WRITE_FILE | 1 << 2), ("/dev/urandom", 1 << 2), (scratch, rights)]
    for path, access in allowed:
        _allow(call, ruleset, path, access & rights)
    _no_new_privileges()
    if call(LANDLOCK["restrict"], ruleset, 0) != 0:
        raise GuardError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def filter_calls() -> None:
    """seccomp: no sockets, no other processes, no signals, nothing of `DENIED`; threads go on."""
    try:
        column = ("x86_64", "aarch64").index(platform.machine())
    except ValueError:
        raise GuardError(
            f"the system call filter knows x86_64 and aarch64, not {platform.machine()}"
        ) from None
    if sys.platform != "linux":
        raise GuardError("only Linux can filter system calls (seccomp)")
    program = make_filter(column)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    _no_new_privileges()
    # For all threads of the process (flag 1), also those that a library started on import.
    if _system_call()(SECCOMP[column], 1, 1, header) != 0:
        raise GuardError(f"seccomp: {os.strerror(ctypes.get_errno())}")


def make_filter(column: int) -> list[tuple[int, int, int, int]]:
    """The filter as BPF instructions; `column` is 0 for x86_64, 1 for aarch64."""
    program = [
        (LOAD, 0, 0, 4),  # the architecture: another one's numbers mean other calls
        (EQUAL, 1, 0, AUDIT[column]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # the call's number
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL),
        # glibc then uses clone, whose flags a filter can see.
        (EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
    ]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL | errno.EPERM)]
    return [
        *program,
        (EQUAL, 0, 3, CLONE[column]),
        (LOAD, 0, 0, 16),  # its first argument, the flags
        (SET, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, FAIL | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
    ]


def _allow(call: "ctypes._NamedFuncPointer", ruleset: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # nothing is there, so there is nothing to allow
    if not os.path.isdir(path):
        access &= WRITE_FILE | 1 << 0 | 1 << 2 | 1 << 14  # the rights that a file can have
    rule = struct.pack("=Qi", access, place)
    done = call(LANDLOCK["add"], ruleset, PATH_BENEATH, rule, 0)
    os.close(place)
    if done != 0:
        raise GuardError(f"Landlock, {path}: {os.strerror(ctypes.get_errno())}")


def _no_new_privileges() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NEW_PRIVILEGES_OFF, 1, 0, 0, 0) != 0:
        raise GuardError(f"prctl: {os.strerror(ctypes.get_errno())}")
    libc.prctl(DUMPABLE, 0, 0, 0, 0)


def _system_call() -> "ctypes._NamedFuncPointer":
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call
