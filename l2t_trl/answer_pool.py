"""
Worker processes that compare answers within a limit of time.

math-verify's own limits are alarms: they work in the main thread alone, and code written in C ignores them. Here each
comparison has a process, which is killed and started anew when its time is up. The workers are plain child processes
that speak JSON lines, so that neither the user's script is imported a second time nor anything is pickled.
"""

import atexit
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

TIME_LIMIT_S = 5
# A busy machine may take long to import sympy.
START_LIMIT_S = 120
MAX_WORKERS = 4
# Importing reasoning-gym counts towards the first request for one of its tasks.
FIRST_TASK_LIMIT_S = 50
# Seconds after which a worker ends itself when nobody is left to kill it.
ORPHAN_LIMIT_S = 60


class AnswerPool:
    """
    A few worker processes, started at the first request and kept.

    Args:
        size (`int`): most workers at a time.
        time_limit_s (`float`): time that one request may take.

    Attributes:
        timed_out (`int`): requests whose time was up, so far.
        crashed (`int`): requests whose worker died, so far.
    """

    def __init__(self, size: int, time_limit_s: float = TIME_LIMIT_S):
        self.size = size
        self.time_limit_s = time_limit_s
        self.timed_out = 0
        self.crashed = 0
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    @property
    def num_workers(self) -> int:
        """Processes that run now."""
        return len(self._workers)

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[bool | None]:
        """
        Return the verdicts on `requests` (see [`l2t_trl.answer_worker.solve`]), in their order.

        A request that takes longer than the limit, or that kills its worker, is `False` and counted. Threads take
        turns.

        Raises:
            RuntimeError: if no worker can be started.
        """
        verdicts: list[bool | None] = [False] * len(requests)
        waiting = deque(enumerate(requests))
        with self._lock:
            try:
                while waiting or any(worker.job is not None for worker in self._workers):
                    self._hand_out(waiting)
                    self._collect(verdicts)
            finally:
                # What was interrupted would answer the next request with this one's verdict.
                for worker in [worker for worker in self._workers if worker.job is not None]:
                    self._drop(worker)
        return verdicts

    def close(self):
        """End all workers; a later request starts new ones."""
        for worker in list(self._workers):
            self._drop(worker)

    def _hand_out(self, waiting: deque):
        while len(self._workers) < min(self.size, len(waiting) + self._num_busy()):
            self._workers.append(_Worker())
        for worker in list(self._workers):
            if waiting and worker.is_ready and worker.job is None:
                job, request = waiting.popleft()
                try:
                    worker.send(job, request, self.time_limit_s)
                except BrokenPipeError:
                    # It was killed from outside while it had nothing to do.
                    waiting.appendleft((job, request))
                    self._drop(worker)

    def _num_busy(self) -> int:
        return sum(worker.job is not None for worker in self._workers)

    def _collect(self, verdicts: list):
        """Wait for the next reply or the next deadline, and act on it."""
        active = [worker for worker in self._workers if worker.deadline is not None]
        if not active:
            return
        timeout = max(0.0, min(worker.deadline for worker in active) - time.monotonic())
        by_pipe = {worker.pipe: worker for worker in active}
        for pipe in wait(list(by_pipe), timeout):
            worker = by_pipe[pipe]
            lines = worker.read_lines()
            if lines is None:
                self._on_death(worker)
            for line in lines or ():
                if worker.job is not None:
                    verdicts[worker.job] = json.loads(line)
                worker.rest()
        now = time.monotonic()
        for worker in active:
            if worker.deadline is not None and worker.deadline <= now and worker in self._workers:
                if worker.job is None:
                    self._drop(worker)
                    raise RuntimeError(f"A process that compares answers did not start within {START_LIMIT_S} s.")
                self.timed_out += 1
                logger.warning(
                    "An answer took longer than %g s to compare and counts as wrong (%d so far).",
                    self.time_limit_s,
                    self.timed_out,
                )
                self._drop(worker)

    def _on_death(self, worker: "_Worker"):
        has_started, had_job = worker.is_ready, worker.job is not None
        self._drop(worker)
        if not has_started:
            raise RuntimeError("A process that compares answers ended as it started; its last words are above.")
        if had_job:
            self.crashed += 1
            logger.warning(
                "An answer ended the process that compared it and counts as wrong (%d so far).", self.crashed
            )

    def _drop(self, worker: "_Worker"):
        worker.kill()
        self._workers.remove(worker)


class _Worker:
    """One process and what it is busy with."""

    def __init__(self):
        # -P: a file of the working folder called json.py must not be imported.
        command = [sys.executable, "-P", "-m", "l2t_trl.answer_worker", str(ORPHAN_LIMIT_S)]
        package_folder = str(Path(__file__).parents[1])
        search_path = os.pathsep.join(filter(None, (package_folder, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": search_path},
        )
        self.pipe = self.process.stdout
        self.is_ready = False
        self.job: int | None = None
        self.deadline: float | None = time.monotonic() + START_LIMIT_S
        self._buffer = b""
        self._has_had_task = False

    def send(self, job: int, request: dict[str, Any], time_limit_s: float):
        """Give the process its next request."""
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        if "task" in request and not self._has_had_task:
            time_limit_s, self._has_had_task = max(time_limit_s, FIRST_TASK_LIMIT_S), True
        self.job, self.deadline = job, time.monotonic() + time_limit_s

    def read_lines(self) -> list[bytes] | None:
        """Return the whole lines that have come, or `None` if the process has ended."""
        data = self.pipe.read(65536)
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return lines

    def rest(self):
        """Note that the process waits for a request: it has said so, or has answered."""
        self.is_ready, self.job, self.deadline = True, None, None

    def kill(self):
        """End the process and wait for it, which takes no time after SIGKILL."""
        self.process.kill()
        self.process.stdin.close()
        self.pipe.close()
        self.process.wait()


def pool_size() -> int:
    """Return how many workers this process may have: the cores, shared with the other trainers of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    trainers = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(MAX_WORKERS, cores // trainers))


_shared: AnswerPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> AnswerPool:
    """Return the pool of this process. It ends with the process."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = AnswerPool(pool_size())
            atexit.register(_shared.close)
        return _shared


def _forget_pool():
    """In a forked child: the workers are the parent's, and its locks may be held by threads that are not here."""
    global _shared, _shared_lock
    if _shared is not None:
        atexit.unregister(_shared.close)
    _shared, _shared_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
