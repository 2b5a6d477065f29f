"""
What the kernel keeps from a program: namespaces, a filter of system calls, limits.

Everything here is Linux's; on other systems [`isolate`] says so.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
import sysconfig
from typing import Any


NAMESPACES, SECCOMP, NONE = "namespaces", "seccomp", "none"

# linux/sched.h, linux/mount.h, linux/prctl.h
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_THREAD = 0x20000000, 0x40000000, 0x10000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
SIGKILL = 9

NOBODY = 65534
WORK_FOLDER = "/work"
# Any folder that is there on every system will do: what is mounted on it is seen by the sandbox alone.
MOUNT_POINTS = ("/mnt", "/media", "/srv", "/tmp", "/var/tmp", "/opt")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# System calls of x86-64 that a program needs to compute; every other one fails with EPERM. There is none to make a
# process, to start a program, to open a socket, to send a signal, to trace, to mount or to leave a namespace.
AUDIT_ARCH_X86_64 = 0xC000003E
COMPUTING = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
    "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18,
    "readv": 19, "writev": 20, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32,
    "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60,
    "uname": 63, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102,
    "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115, "getresuid": 118,
    "getresgid": 120, "getpgid": 121, "getsid": 124, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "rt_sigsuspend": 130, "sigaltstack": 131, "setrlimit": 160, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "eventfd2": 290, "epoll_create1": 291, "dup3": 292,
    "pipe2": 293, "getcpu": 309, "getrandom": 318, "rseq": 334,
}  # fmt: skip
# Only where a mount namespace holds nothing but what a program may see.
FILES = {
    "open": 2, "stat": 4, "lstat": 6, "access": 21, "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76,
    "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84,
    "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90, "fchmod": 91, "umask": 95,
    "statfs": 137, "fstatfs": 138, "getdents64": 217, "openat": 257, "mkdirat": 258, "newfstatat": 262,
    "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268,
    "faccessat": 269, "utimensat": 280, "renameat2": 316, "statx": 332, "faccessat2": 439,
}  # fmt: skip
# Number, which argument is looked at, and its allowed values: what a terminal is asked, descriptors without owners
# (an owner would be sent signals), and limits of the process itself.
RESTRICTED = (
    (16, 1, (0x5401, 0x5450, 0x5451, 0x5421)),  # ioctl: TCGETS, FIONCLEX, FIOCLEX, FIONBIO
    (72, 1, (0, 1, 2, 3, 1030)),  # fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
    (302, 0, (0,)),  # prlimit64
)
CLONE, CLONE3 = 56, 435

BPF_LOAD, BPF_EQUAL, BPF_BITS, BPF_RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, ERROR, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000


class _Library:
    """The C library's functions, with its errors as `OSError`."""

    def __getattr__(self, name: str):
        function = getattr(ctypes.CDLL(None, use_errno=True), name)

        def call(*args: Any) -> int:
            result = function(*args)
            if result < 0:
                number = ctypes.get_errno()
                raise OSError(number, f"{name}: {os.strerror(number)}")
            return result

        setattr(self, name, call)
        return call


libc = _Library()


def isolate(wanted: str) -> tuple[str, list[str]]:
    """
    Shut this process off from network and files as far as the system permits.

    Args:
        wanted (`str`):
            `"namespaces"`, `"seccomp"` or `"none"`, or `"auto"` for the first that is permitted.

    Returns:
        `tuple[str, list[str]]`: what it has become, and why it is no more than that.
    """
    reasons = []
    if wanted == NONE:
        return NONE, reasons
    if sys.platform != "linux":
        return NONE, [f"namespaces and seccomp are Linux's, and this is {sys.platform}"]
    if wanted != SECCOMP:
        # In a child first: half an isolation cannot be undone.
        reason = _failure_in_child(_enter_namespaces)
        if reason is None:
            _enter_namespaces()
            return NAMESPACES, reasons
        reasons.append(f"namespaces: {reason}")
        if wanted == NAMESPACES:
            return NONE, reasons
    reason = _failure_in_child(lambda: filter_calls(has_files=False))
    if reason is None:
        return SECCOMP, reasons
    return NONE, [*reasons, f"seccomp: {reason}"]


def _failure_in_child(function) -> str | None:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except OSError as error:
            os.write(write_fd, str(error).encode())
        os._exit(0)
    os.close(write_fd)
    with open(read_fd, "rb") as file:
        reason = file.read().decode()
    os.waitpid(pid, 0)
    return reason or None


def _enter_namespaces() -> None:
    """
    Enter namespaces of one's own: users, mounts, network, IPC, host name, and processes for all later children.

    Root enters as nobody: what leaks out of a sandbox of root's would be root. Another user stays who it is.
    """
    others = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    # The kernel's view of processes stays reachable until the users are mapped; programs do not see it.
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    if os.geteuid() == 0:
        libc.unshare(others)
        _enter_root()
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # A process that changed its user may not write its own maps otherwise.
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        user, group = NOBODY, NOBODY
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID)
        _map_users(proc, user, group)
    else:
        user, group = os.geteuid(), os.getegid()
        libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | others)
        _map_users(proc, user, group)
        _enter_root()
    os.close(proc)
    # What each program does later, tried once.
    libc.mount(b"tmpfs", WORK_FOLDER.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=64k")
    libc.umount2(WORK_FOLDER.encode(), MNT_DETACH)


def _map_users(proc: int, user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc), "w") as file:
            file.write(text)


def _enter_root() -> None:
    """Make a root folder that holds Python's standard library, the system's libraries and four devices, read-only."""
    libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    library = sysconfig.get_path("stdlib")
    sources = [path for path in (*LIBRARIES, library, sysconfig.get_path("platstdlib")) if os.path.isdir(path)]
    sources = list(dict.fromkeys(sources))
    root = next(
        (
            path
            for path in MOUNT_POINTS
            if os.path.isdir(path) and not any(os.path.realpath(source).startswith(path + "/") for source in sources)
        ),
        None,
    )
    if root is None:
        raise OSError(errno.ENOENT, f"none of {', '.join(MOUNT_POINTS)} can be mounted on")
    libc.mount(b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    for path in sources:
        if os.path.islink(path):
            # /lib is usr/lib on most systems.
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
            continue
        os.makedirs(root + path, exist_ok=True)
        _bind(path, root + path)
    packages = os.path.join(library, "site-packages")
    if os.path.isdir(packages):
        libc.mount(b"tmpfs", (root + packages).encode(), b"tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, b"size=4k")
    os.mkdir(root + "/dev")
    for path in DEVICES:
        if os.path.exists(path):
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
            libc.mount(path.encode(), (root + path).encode(), None, MS_BIND, None)
    os.mkdir(root + WORK_FOLDER)
    os.chdir(root)
    libc.pivot_root(b".", b".")
    libc.umount2(b".", MNT_DETACH)
    os.chdir("/")
    libc.mount(None, b"/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, None)


def _bind(source: str, target: str) -> None:
    libc.mount(source.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    flags = os.statvfs(target).f_flag
    # What the system forbids on that mount has to stay forbidden when it is made read-only.
    kept = flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME)
    if flags & os.ST_RELATIME:
        kept |= 1 << 21
    libc.mount(None, target.encode(), None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept, None)


def enter_work_folder(num_bytes: int) -> None:
    """Enter an empty folder in memory, and a process namespace for later children; both end with this process."""
    libc.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC)
    options = f"size={num_bytes},nr_inodes=1024,mode=700"
    libc.mount(b"tmpfs", WORK_FOLDER.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options.encode())
    os.chdir(WORK_FOLDER)


def drop_privileges() -> None:
    """Give up the capabilities that this process has in its namespaces, for good."""
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # _LINUX_CAPABILITY_VERSION_3, this process; two times effective, permitted and inheritable.
    header, empty = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6)
    libc.capset(header, empty)


def end_with_parent() -> None:
    """Let this process be killed when its parent ends."""
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def limit(limits: dict[str, int], has_own_users: bool) -> None:
    """Set the limits of this process, soft and hard."""
    wanted = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_CORE: 0,
    }
    if has_own_users:
        # Elsewhere every process of the user would count.
        wanted[resource.RLIMIT_NPROC] = limits["processes"]
    for name, value in wanted.items():
        _, hard = resource.getrlimit(name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def filter_calls(has_files: bool) -> None:
    """
    Let this process and its threads make no system calls but those of [`COMPUTING`], and of [`FILES`] if it has files.

    Raises:
        OSError: if the machine is none that the list is for, or the kernel permits no filters.
    """
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, f"the list of system calls is for x86_64, and this is {platform.machine()}")
    instructions = [(BPF_LOAD, 0, 0, 4), (BPF_EQUAL, 1, 0, AUDIT_ARCH_X86_64), (BPF_RETURN, 0, 0, KILL_PROCESS)]
    instructions.append((BPF_LOAD, 0, 0, 0))
    for number in [*COMPUTING.values(), *(FILES.values() if has_files else ())]:
        instructions += [(BPF_EQUAL, 0, 1, number), (BPF_RETURN, 0, 0, ALLOW)]
    for number, argument, values in RESTRICTED:
        tests = [line for value in values for line in ((BPF_EQUAL, 0, 1, value), (BPF_RETURN, 0, 0, ALLOW))]
        block = [(BPF_LOAD, 0, 0, 16 + 8 * argument), *tests, (BPF_RETURN, 0, 0, ERROR | errno.EPERM)]
        instructions += [(BPF_EQUAL, 0, len(block), number), *block]
    # Threads are made, processes are not.
    instructions += [
        (BPF_EQUAL, 0, 4, CLONE),
        (BPF_LOAD, 0, 0, 16),
        (BPF_BITS, 0, 1, CLONE_THREAD),
        (BPF_RETURN, 0, 0, ALLOW),
        (BPF_RETURN, 0, 0, ERROR | errno.EPERM),
        # The C library then asks for a thread in the old way, whose flags can be looked at.
        (BPF_EQUAL, 0, 1, CLONE3),
        (BPF_RETURN, 0, 0, ERROR | errno.ENOSYS),
        (BPF_RETURN, 0, 0, ERROR | errno.EPERM),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]

    filter_ = Filter(len(instructions), ctypes.addressof(buffer))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0)
