"""
The process that runs programs one after another: `python -I -S FOLDER OPTIONS`, requests on stdin, verdicts on stdout.

It needs the standard library alone, so that it starts at once and forks cheaply. Four processes have a part:

    keeper     shuts itself off (isolation.py), then only waits for the next, so that it can be killed
    server     makes the next two for every program, watches the clock and ends them; never sees a request
    checker    reads the request, runs the tests and asks the last for every call (checks.py)
    solver     defines the program and answers calls (program.py); was forked before the request was read

The server is process 1 of its namespace and the solver of one below: neither sees the others, and with the first of
them ends all that was made in it.
"""

import fcntl
import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable

import checks
import isolation
import program
import wire


REQUESTS_FD, VERDICTS_FD = 0, 1
# What programs import: at hand in every one of them, and where files cannot be opened all there is.
PRELOADED = """
abc array ast base64 binascii bisect calendar cmath codecs collections collections.abc colorsys contextlib copy copyreg
csv dataclasses datetime decimal difflib enum fnmatch fractions functools gc hashlib heapq hmac html inspect io
itertools json keyword locale math numbers operator pprint queue random re secrets statistics string struct
sys textwrap threading time timeit tokenize traceback types typing unicodedata uuid warnings weakref zlib
""".split()
MAX_STATUS_BYTES = 1 << 16
MAX_FD = 1 << 16
TIMED_OUT = "timed out"


def main() -> None:
    """Isolate, say how well on stdout, then serve."""
    options = json.loads(sys.argv[1])
    del sys.path[0]
    for name in PRELOADED:
        __import__(name)
    level, reasons = isolation.isolate(options["isolation"])
    if level == isolation.NONE and not options["allow_unisolated"]:
        wire.send(VERDICTS_FD, {"level": level, "reasons": reasons})
        return
    gc.collect()
    gc.freeze()
    if level != isolation.NAMESPACES:
        serve(level, reasons, options["limits"])
        return
    server = os.fork()
    if server == 0:
        isolation.end_with_parent()
        serve(level, reasons, options["limits"])
        os._exit(0)
    for fd in (REQUESTS_FD, VERDICTS_FD):
        os.close(fd)
    os.waitpid(server, 0)


def serve(level: str, reasons: list[str], limits: dict[str, int]) -> None:
    """Run one program after another, until whoever asks has gone."""
    if sys.platform == "linux":
        isolation.adopt_orphans()
    wire.send(VERDICTS_FD, {"level": level, "reasons": reasons})
    while True:
        status_fd, write_fd = os.pipe()
        checker = os.fork()
        if checker == 0:
            os.close(status_fd)
            _run(_check, level, limits, write_fd)
        os.close(write_fd)
        verdict = _watch(status_fd)
        os.close(status_fd)
        _end_all(level, checker)
        if verdict is None:
            return
        try:
            wire.send(VERDICTS_FD, verdict)
        except BrokenPipeError:
            return


def _watch(status_fd: int) -> list[str] | None:
    """Return the verdict of a checker that first says how long it may take, or `None` if it got no request."""
    status, deadline = b"", None
    poll = select.poll()
    poll.register(status_fd, select.POLLIN)
    while status.count(b"\n") < 2 and len(status) < MAX_STATUS_BYTES:
        rest = None if deadline is None else deadline - time.monotonic()
        if rest is not None and rest <= 0:
            return [TIMED_OUT, ""]
        if not poll.poll(None if rest is None else 1000 * rest):
            continue
        data = os.read(status_fd, MAX_STATUS_BYTES)
        if not data:
            return None if deadline is None else [checks.FAILED, "the checks ended early"]
        status += data
        if deadline is None and b"\n" in status:
            deadline = time.monotonic() + json.loads(status.split(b"\n")[0])
    verdict = status.split(b"\n")[1]
    # Passing within the time counts, even if it was read a little later.
    return json.loads(verdict)


def _end_all(level: str, checker: int) -> None:
    """Kill whatever is left of a program, and wait until it is gone."""
    if level == isolation.NAMESPACES and os.getpid() == 1:
        # All processes of the namespace but this one.
        _kill(os.kill, -1)
        _wait_for_all()
        return
    # The checker leads the group of both.
    _kill(os.killpg, checker)
    _kill(os.kill, checker)
    os.waitpid(checker, 0)
    if sys.platform == "linux":
        # What has left the group was orphaned and is this process's by now.
        while children := _children():
            for pid in children:
                _kill(os.kill, pid)
                os.waitpid(pid, 0)


def _kill(kill: Callable[[int, int], None], number: int) -> None:
    try:
        kill(number, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _wait_for_all() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(number) for number in file.read().split()]


def _run(function: Callable[..., None], *args) -> None:
    """Call the function of a forked process, which ends with it whatever it raises."""
    try:
        function(*args)
    except BaseException:
        # Seen where the isolation itself fails; later the error output leads nowhere.
        traceback.print_exc()
    finally:
        os._exit(1)


def _check(level: str, limits: dict[str, int], status_fd: int) -> None:
    """The checker: make the solver, read the request, run the tests, say the verdict."""
    os.setsid()
    if level == isolation.NAMESPACES:
        isolation.enter_work_folder(limits["disk_bytes"])
    elif level == isolation.SECCOMP:
        isolation.end_with_parent()
    source_fd, ask_fd = os.pipe()
    reply_fd, answer_fd = os.pipe()
    # Before anything of the request is in memory, which the solver has a copy of.
    if os.fork() == 0:
        _run(_solve, level, limits, source_fd, answer_fd)
    os.close(source_fd)
    os.close(answer_fd)
    request = wire.receive(REQUESTS_FD)
    if request is None:
        return
    os.write(status_fd, json.dumps(request["time_s"]).encode() + b"\n")
    _move_fds(ask_fd, reply_fd, status_fd)
    _confine(level, limits)
    verdict = checks.check(request, checks.Channel(3, 4))
    os.write(5, json.dumps(verdict).encode() + b"\n")


def _solve(level: str, limits: dict[str, int], source_fd: int, answer_fd: int) -> None:
    """The solver: keep the two descriptors, give up the rest, and answer."""
    if level == isolation.SECCOMP:
        isolation.end_with_parent()
    _move_fds(source_fd, answer_fd)
    # A write beyond the limit shall be an error of the program's, not its end.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _confine(level, limits)
    program.serve(3, 4)


def _move_fds(*fds: int) -> None:
    """Give the descriptors the numbers from 3 on, have the standard ones read and write nothing, close all others."""
    # First out of the way of each other.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in fds]
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    for number, fd in enumerate(high, start=3):
        os.dup2(fd, number)
    os.closerange(3 + len(fds), MAX_FD)


def _confine(level: str, limits: dict[str, int]) -> None:
    """Limit this process and take from it what it may not do. Nothing of this can be undone."""
    sys.set_int_max_str_digits(0)
    isolation.limit(limits, has_own_users=level == isolation.NAMESPACES)
    if level == isolation.NONE:
        return
    if level == isolation.NAMESPACES:
        isolation.drop_privileges()
    try:
        isolation.filter_calls(has_files=level == isolation.NAMESPACES)
    except OSError:
        # Namespaces do without, as on machines that the filter is not written for.
        if level == isolation.SECCOMP:
            raise


if __name__ == "__main__":
    main()
