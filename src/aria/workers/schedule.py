"""Scheduling of jobs: those that have run least go first, so that long jobs do not delay others."""

from __future__ import annotations

import itertools
import math
import threading
import time

from aria.workers.process import Worker

QUANTUM = 0.25
"""Seconds for which a new job has the highest priority. Each further level lasts twice as long."""
SLICE = 0.1
"""Minimum seconds for which a chosen job runs."""
SLOW_LEVEL = 1
"""Level from which the process of a job gets a lower priority than everything else on the machine."""


class JobSlot:
    """The scheduling state of a job.

    Attributes:
        worker: Its worker process, once assigned.
        runs: Set while the job may run.
        waits: The job is waiting for something other than a CPU.
    """

    def __init__(self, number: int):
        self.number = number
        self.worker: Worker | None = None
        self.runs = threading.Event()
        self.waits = False
        self._spent = 0.0
        self._since: float | None = None
        self._paused = time.monotonic()

    def level(self, now: float) -> int:
        """Priority level by running time; 0 for less than a quantum."""
        spent = self._spent + (now - self._since if self._since is not None else 0.0)
        return int(math.log2(1 + spent / QUANTUM))

    def rank(self, now: float) -> int:
        """The level minus the seconds spent waiting, so that a stream of new jobs starves nobody. Lowest goes first."""
        if self._since is None:
            return max(self.level(now) - int(now - self._paused), 0)
        return -1 if now - self._since < SLICE else self.level(now)

    def start(self, now: float) -> None:
        self._since = now
        if self.worker is not None:
            self.worker.resume()
        self.runs.set()

    def stop(self, now: float) -> None:
        assert self._since is not None, "only a running job can be stopped"
        self._spent += now - self._since
        self._since, self._paused = None, now
        self.runs.clear()
        if self.worker is not None:
            self.worker.pause()


class JobSchedule:
    """Runs ``count`` jobs at a time, those that have run least, and pauses the processes of all others.

    Jobs of the same rank: running ones stay, then first come, first served.
    """

    def __init__(self, count: int):
        self._count = count
        self._turns: list[JobSlot] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def enter(self) -> JobSlot:
        """Add a job."""
        with self._lock:
            turn = JobSlot(next(self._numbers))
            self._turns.append(turn)
            self._update()
        return turn

    def update(self) -> None:
        """Reschedule. To be called regularly while waiting for a job."""
        with self._lock:
            self._update()

    def set_waiting(self, turn: JobSlot, waits: bool) -> None:
        """Record whether a job is waiting for something other than a CPU."""
        with self._lock:
            turn.waits = waits
            self._update()

    def set_worker(self, turn: JobSlot, worker: Worker) -> None:
        """Assign a running worker process to a job."""
        with self._lock:
            turn.worker = worker
            if not turn.runs.is_set():
                worker.pause()

    def leave(self, turn: JobSlot) -> None:
        """Remove a finished job. Its process is left running."""
        with self._lock:
            self._turns.remove(turn)
            if turn.worker is not None and not turn.runs.is_set():
                turn.worker.resume()
            self._update()

    def _update(self) -> None:
        now = time.monotonic()
        ready = [turn for turn in self._turns if not turn.waits]
        ready.sort(key=lambda turn: (turn.rank(now), not turn.runs.is_set(), turn.number))
        chosen = ready[: self._count]
        for turn in self._turns:
            if turn.runs.is_set() and turn not in chosen:
                turn.stop(now)
        for turn in chosen:
            if not turn.runs.is_set():
                turn.start(now)
            if turn.worker is not None and not turn.worker.slow and turn.level(now) >= SLOW_LEVEL:
                turn.worker.lower_priority()
