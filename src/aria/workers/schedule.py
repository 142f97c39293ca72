"""Which of many jobs may run now: the one that has run least goes first, so that long ones cost nobody else."""

from __future__ import annotations

import itertools
import math
import threading
import time

from aria.workers.process import Worker

QUANTUM = 0.25
"""Seconds for which a new job runs before all others; each level after the first lasts twice as long."""
SLICE = 0.1
"""Seconds that what is chosen runs in any case."""
SLOW_LEVEL = 1
"""From which level on a job's process is given less of the processors than everything else on the machine."""


class JobSlot:
    """A job's place among the others.

    Attributes:
        worker: its process, once it has one.
        runs: set while it may run.
        waits: it needs no processor now.
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
        """How long it has run; 0 for less than a quantum."""
        spent = self._spent + (now - self._since if self._since is not None else 0.0)
        return int(math.log2(1 + spent / QUANTUM))

    def rank(self, now: float) -> int:
        """Its level, less the seconds that it has waited for: a stream of new jobs stops nobody for good."""
        if self._since is None:
            return max(self.level(now) - int(now - self._paused), 0)
        return -1 if now - self._since < SLICE else self.level(now)

    def start(self, now: float) -> None:
        self._since = now
        if self.worker is not None:
            self.worker.resume()
        self.runs.set()

    def stop(self, now: float) -> None:
        assert self._since is not None, "only what runs can be stopped"
        self._spent += now - self._since
        self._since, self._paused = None, now
        self.runs.clear()
        if self.worker is not None:
            self.worker.pause()


class JobSchedule:
    """Runs ``count`` jobs at a time, those that have run least; the processes of all others are paused.

    Among jobs of one rank those that run stay, then whoever came first.
    """

    def __init__(self, count: int):
        self._count = count
        self._turns: list[JobSlot] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def enter(self) -> JobSlot:
        """A new job."""
        with self._lock:
            turn = JobSlot(next(self._numbers))
            self._turns.append(turn)
            self._update()
        return turn

    def update(self) -> None:
        """To be called every now and then by whoever waits for a job."""
        with self._lock:
            self._update()

    def set_waiting(self, turn: JobSlot, waits: bool) -> None:
        """Whether a job waits for something else than a processor."""
        with self._lock:
            turn.waits = waits
            self._update()

    def set_worker(self, turn: JobSlot, worker: Worker) -> None:
        """A job has a process, which is running."""
        with self._lock:
            turn.worker = worker
            if not turn.runs.is_set():
                worker.pause()

    def leave(self, turn: JobSlot) -> None:
        """A job is over; its process is running."""
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
