"""
Run programs that a model has written, and tests on them, without trusting them: docs/sandbox.md says how.

The programs run in processes of their own (sandbox_process), never in this one.
"""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from l2t_trl.errors import UserError
from l2t_trl.evaluation.sandbox_process import wire


PROCESS_FOLDER = Path(__file__).parent / "sandbox_process"
ISOLATIONS = ("auto", "namespaces", "seccomp", "none")
ALLOW_UNISOLATED = "L2T_ALLOW_UNISOLATED_CODE"
# Beyond a program's own time: to start a server, and to kill a program on a machine that is busy.
GRACE_S = 60.0


class SandboxError(RuntimeError):
    """The sandbox itself does not work, whatever the program."""


@dataclass(frozen=True)
class Limits:
    """
    What one program may use.

    Attributes:
        memory_bytes (`int`): address space of its process.
        cpu_s (`int`): processor time, a second line behind the time of each job.
        file_bytes (`int`): length of one file.
        disk_bytes (`int`): all its files together; they are in memory.
        open_files (`int`): descriptors.
        processes (`int`): threads, those of the sandbox included; there are no further processes.
    """

    memory_bytes: int = 1 << 30
    cpu_s: int = 60
    file_bytes: int = 1 << 20
    disk_bytes: int = 8 << 20
    open_files: int = 64
    processes: int = 32


@dataclass(frozen=True)
class Job:
    """
    A program and its tests.

    Attributes:
        program (`str`): what the model has written.
        tests (`str`): Python that raises an error if the program is wrong.
        prelude (`str`): trusted definitions that the tests use.
        targets (`tuple[str, ...]`): names that the tests take from the program even if the prelude binds them.
        time_s (`float`): wall time for all of it.
    """

    program: str
    tests: str
    prelude: str = ""
    targets: tuple[str, ...] = ()
    time_s: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """
    What became of a job.

    Attributes:
        status (`str`): `"passed"`, `"failed"`, `"timed out"`, or `"bad tests"` if the tests are no Python.
        reason (`str`): the error that ended it.
    """

    status: Literal["passed", "failed", "timed out", "bad tests"]
    reason: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the program passed; `None` if the tests cannot tell."""
        return None if self.status == "bad tests" else self.status == "passed"


class Sandbox:
    """
    A number of servers that run programs, each one program at a time. Threads may share it.

    Args:
        workers (`int`, *optional*):
            Programs that run at the same time, by default one per processor of this process.
        limits ([`Limits`], *optional*):
            What each program may use.
        isolation (`str`, *optional*, defaults to `"auto"`):
            `"namespaces"`, `"seccomp"`, or the first of the two that the system permits. `"none"` has limits only.
        allow_unisolated (`bool`, *optional*):
            Whether to go on where a program could reach network and files; by default what the environment variable
            L2T_ALLOW_UNISOLATED_CODE says (`1`).

    Raises:
        UserError: if the system permits no isolation and `allow_unisolated` is not set; names the reasons.
    """

    def __init__(
        self,
        workers: int | None = None,
        limits: Limits | None = None,
        isolation: str = "auto",
        allow_unisolated: bool | None = None,
    ):
        if isolation not in ISOLATIONS:
            raise UserError(f"isolation: got {isolation!r}; set one of {', '.join(ISOLATIONS)}.")
        if workers is not None and workers < 1:
            raise UserError(f"workers: got {workers}; set at least 1.")
        if allow_unisolated is None:
            allow_unisolated = os.environ.get(ALLOW_UNISOLATED) == "1"
        self.workers = workers or default_workers()
        options = {
            "limits": asdict(limits or Limits()),
            "isolation": isolation,
            "allow_unisolated": allow_unisolated,
        }
        first = _Server(options)
        self.isolation = first.start()
        self._servers = [first, *(_Server(options) for _ in range(self.workers - 1))]
        self._free: queue.LifoQueue[_Server] = queue.LifoQueue()
        for server in reversed(self._servers):
            self._free.put(server)

    def run(self, job: Job) -> Verdict:
        """
        Run one job; waits for a free server.

        Raises:
            SandboxError: if the sandbox does not work.
        """
        server = self._free.get()
        try:
            return server.run(job)
        finally:
            self._free.put(server)

    def run_all(self, jobs: Iterable[Job], description: str | None = None) -> list[Verdict]:
        """
        Run jobs side by side.

        Args:
            jobs (`Iterable[Job]`):
                The jobs.
            description (`str`, *optional*):
                Title of a progress bar; without it there is none.

        Returns:
            `list[Verdict]`: in the order of the jobs.
        """
        jobs = list(jobs)
        with ThreadPoolExecutor(self.workers) as pool:
            verdicts = pool.map(self.run, jobs)
            if description is None:
                return list(verdicts)
            from tqdm.auto import tqdm

            return list(tqdm(verdicts, desc=description, total=len(jobs)))

    def close(self) -> None:
        """End all servers, and with them whatever runs in them."""
        for server in self._servers:
            server.stop()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass
class _Server:
    """One process of sandbox_process."""

    options: dict
    process: subprocess.Popen | None = field(default=None, init=False)

    def start(self) -> str:
        """Start the process and return how it is isolated."""
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(PROCESS_FOLDER), json.dumps(self.options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, cwd="/", bufsize=0, start_new_session=True
        )
        weakref.finalize(self, _end, self.process)
        hello = self._receive(GRACE_S)
        if hello is None:
            raise SandboxError("The sandbox process does not start.")
        if hello["level"] == "none" and not self.options["allow_unisolated"]:
            self.stop()
            reasons = "; ".join(hello["reasons"]) or "isolation 'none' was asked for"
            raise UserError(
                "Programs written by a model would reach this machine's files and network, so they are not run "
                f"({reasons}). Permit user namespaces or run as root, or set {ALLOW_UNISOLATED}=1 where nothing can "
                "be lost, as in a container without network."
            )
        return hello["level"]

    def run(self, job: Job) -> Verdict:
        request = asdict(job)
        for _ in range(2):
            try:
                if self.process is None:
                    self.start()
                wire.send(self.process.stdin.fileno(), request)
                verdict = self._receive(job.time_s + GRACE_S)
            except BrokenPipeError:
                verdict = None
            if verdict is not None:
                return Verdict(*verdict)
            # No program can end a server; if someone else did, another one is started, once.
            self.stop()
        raise SandboxError("The sandbox process ended twice while it ran the same program.")

    def stop(self) -> None:
        if self.process is not None:
            _end(self.process)
            self.process = None

    def _receive(self, timeout_s: float):
        """Return a message, or `None` if the process has gone or does not answer."""
        fd = self.process.stdout.fileno()
        ready, _, _ = select.select([fd], [], [], timeout_s)
        return wire.receive(fd) if ready else None


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def default_workers() -> int:
    """Processors of this process, shared with the other ranks of this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks) if hasattr(os, "sched_getaffinity") else 1


_shared: tuple[int, Sandbox] | None = None
_lock = threading.Lock()


def shared_sandbox() -> Sandbox:
    """Return the sandbox of this process, made when it is first asked for; a forked process gets one of its own."""
    global _shared
    with _lock:
        if _shared is None or _shared[0] != os.getpid():
            _shared = (os.getpid(), Sandbox())
        return _shared[1]
