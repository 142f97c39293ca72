"""`Workers`: functions run in child processes that are limited, scheduled and killed."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from aria.workers.cancellation import check_cancelled
from aria.workers.channel import ChannelClosedError
from aria.workers.process import BusyError, ForkServer, Worker, WorkerError
from aria.workers.schedule import JobSchedule, JobSlot
from aria.workers.shared import SharedFile, open_reader

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
"""Most seconds between two looks at whether a job's caller has left, and whose turn it is."""
MAX_JOBS = 64
"""Jobs that have begun, running or paused; more wait for one of them to end."""
MAX_ARRAYS = 10_000
"""Of one job."""
JOBS_OF_A_WORKER = 500
"""After which its process is replaced: what it has leaked goes with it."""

Calls = Mapping[str, Callable[..., Any]]


class Workers:
    """Processes for functions that read what strangers send. They are started when they are first needed.

    Args:
        count: jobs that run at a time; what runs long is paused for what comes new.
        memory_bytes: of address space that a process may take beyond its start.
    """

    def __init__(self, count: int, memory_bytes: int):
        self.count, self.memory_bytes = count, memory_bytes
        self._fork_server = ForkServer(memory_bytes)
        self._schedule = JobSchedule(count)
        self._places = threading.BoundedSemaphore(MAX_JOBS)
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._paused: dict[Worker, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._reported = False

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        name: str,
        seconds: float,
        files: Sequence[bytes | SharedFile] = (),
        calls: Calls | None = None,
    ) -> tuple[Any, list[np.ndarray]]:
        """Call ``function(job, *arguments)`` in a worker, with a :class:`~aria.workers.child.Job`.

        Args:
            function: of a module's top level.
            arguments: anything that can be pickled.
            name: what errors call the thing that is worked on.
            seconds: after which the process is killed, counted from now; three times as many where others' jobs, or
                the machine's, left it less than half of them.
            files: what ``job.file(index)`` opens.
            calls: what ``job.call`` reaches. They run in this thread; a ValueError that one raises is raised in the
                worker, and any other exception ends the job and is raised here. The process may be in the hands of
                whoever made the files, so that arguments can be any JSON.

        Returns:
            What the function returned, as JSON has it, and the arrays that it made with ``job.array``.

        Raises:
            ValueError: the function raised one, took too long or too much memory, or its process ended.
            BusyError: others' jobs left it no time or no memory.
            WorkerError: no process can be started.
            Cancelled: the caller has left, see :mod:`aria.workers.cancellation`.
        """
        deadline = _JobDeadline(seconds)
        with contextlib.ExitStack() as held:
            inputs = []
            for one in files:
                if isinstance(one, bytes):
                    one = SharedFile.of_bytes(one)
                    held.callback(one.close)
                inputs.append(one)
            held.enter_context(self._place(deadline))
            turn = self._schedule.enter()
            worker = None
            healthy = False
            try:
                self._wait(turn.runs.is_set, deadline)
                worker = self._take()
                self._schedule.set_worker(turn, worker)
                qualified = f"{function.__module__}:{function.__qualname__}"
                worker.start(qualified, arguments, inputs, cpu_seconds=seconds * 2 + 5)
                result = _JobSession(self, worker, turn, name, calls or {}, deadline).run()
                healthy = True
                return result
            except ChannelClosedError as error:
                if self._closed:
                    raise WorkerError("the workers of this process were ended") from error
                raise ValueError(
                    f"{name} cannot be read: the process that read it crashed, as damaged and hostile input makes it; "
                    "send something else"
                ) from error
            except _InputError as fault:
                healthy = True
                raise ValueError(str(fault)) from None
            finally:
                self._schedule.leave(turn)
                if worker is not None:
                    self._give_back(worker, healthy)

    @property
    def busy(self) -> int:
        """Processes that have a job."""
        return len(self._busy)

    def warm_up(self) -> None:
        """Start a process now, so that the first job need not wait for it.

        Raises:
            WorkerError: it cannot be started.
        """
        self._give_back(self._take(), healthy=True)

    def close(self) -> None:
        """End all processes; jobs that run fail."""
        with self._lock:
            self._closed = True
            workers = [*self._idle, *self._busy]
            self._idle.clear()
        for worker in workers:
            worker.kill()
        self._fork_server.close()

    def bound_memory(self, worker: Worker, *, paused: bool) -> None:
        """Give up a paused job if all that are paused hold more memory than one process may, and it the most.

        Raises:
            BusyError: it is given up.
        """
        held = worker.resident_bytes() if paused else 0
        with self._lock:
            self._paused[worker] = held
            together, most = sum(self._paused.values()), max(self._paused.values())
        if together > self.memory_bytes and held == most:
            raise BusyError("too many media take much memory; try again later")

    def _take(self) -> Worker:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
            if worker is not None:
                self._busy.add(worker)
                return worker
        worker = self._fork_server.worker()
        with self._lock:
            self._busy.add(worker)
            first, self._reported = not self._reported, True
        if first and worker.missing:
            logger.warning("media are read in processes of their own, which here lack %s", "; ".join(worker.missing))
        return worker

    def _give_back(self, worker: Worker, healthy: bool) -> None:
        with self._lock:
            self._busy.discard(worker)
            self._paused.pop(worker, None)
            keep = healthy and not worker.slow and worker.jobs < JOBS_OF_A_WORKER and not self._closed
            keep = keep and len(self._idle) < self.count
            if keep:
                self._idle.append(worker)
        if not keep:
            worker.kill()

    @contextlib.contextmanager
    def _place(self, deadline: _JobDeadline) -> Iterator[None]:
        self._wait(lambda: self._places.acquire(blocking=False), deadline)
        try:
            yield
        finally:
            self._places.release()

    def _wait(self, ready: Callable[[], bool], deadline: _JobDeadline) -> None:
        """Until something is so.

        Raises:
            BusyError: the time is up.
            Cancelled: the caller has left.
        """
        while not ready():
            check_cancelled()
            if deadline.last < time.monotonic():
                raise BusyError("too many media are being read; try again later")
            self._schedule.update()
            time.sleep(0.005)


class NotReady(Exception):  # noqa: N818
    """Raised by a function that a worker calls: it is called again until it returns or the job ends."""


def retry_until_ready(function: Callable[..., Any], arguments: Sequence[Any], check: Callable[[], None]) -> Any:
    """What a function returns, called until it no longer raises :class:`NotReady`; ``check`` may end that."""
    while True:
        with contextlib.suppress(NotReady):
            return function(*arguments)
        check()
        time.sleep(0.02)


class _JobDeadline:
    """When a job is given up: after some seconds, or after three times as many if it could not work meanwhile."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.last = self.end + 2 * seconds


class _InputError(Exception):
    """What is wrong with a job's input, found by its function: its process is as good as before."""


class _JobSession:
    """A job as its caller follows it: calls answered, arrays made, the result received."""

    def __init__(
        self, workers: Workers, worker: Worker, turn: JobSlot, name: str, calls: Calls, deadline: _JobDeadline
    ):
        self._workers, self._schedule, self._worker, self._turn = workers, workers._schedule, worker, turn
        self._room = workers.memory_bytes
        self._name, self._calls, self._deadline = name, calls, deadline
        self._used = worker.cpu_seconds()
        self._arrays: list[np.ndarray] = []
        self._shared: np.ndarray | None = None
        self._files = contextlib.ExitStack()

    def run(self) -> tuple[Any, list[np.ndarray]]:
        with self._files:
            return self._follow()

    def _follow(self) -> tuple[Any, list[np.ndarray]]:
        while True:
            message = self._worker.receive(POLL_SECONDS)
            if message is None:
                self._check()
                self._schedule.update()
                self._workers.bound_memory(self._worker, paused=not self._turn.runs.is_set())
            elif "call" in message:
                self._answer(str(message["call"]), message.get("arguments") or [])
            elif "result" in message:
                self._take_array()
                return message["result"], self._arrays
            elif "memory" in message:
                raise ValueError(
                    f"{self._name} cannot be read: that takes more than the {self._workers.memory_bytes:,} bytes of "
                    "memory that are allowed; make it smaller"
                )
            elif "error" in message:
                raise _InputError(str(message["error"]))
            else:
                logger.error("reading %s failed: %s", self._name, message.get("failure"))
                raise ValueError(f"{self._name} cannot be read: {message.get('failure')}")

    def _check_memory(self) -> None:
        check_cancelled()
        if self._deadline.last < time.monotonic():
            raise BusyError("too many media are being read for the memory that they may take; try again later")

    def _check(self) -> None:
        check_cancelled()
        now, seconds = time.monotonic(), self._deadline.seconds
        # Who was kept from working by others is not at fault.
        if self._deadline.end < now and self._worker.cpu_seconds() - self._used >= seconds / 2:
            raise ValueError(f"reading {self._name} took longer than {seconds:g} s; send a smaller or shorter one")
        if self._deadline.last < now:
            raise BusyError(f"reading {self._name} took longer than {seconds:g} s; the server is busy, try again later")

    def _answer(self, name: str, arguments: Any) -> None:
        if name == "array":
            self._array(arguments)
            return
        if name not in self._calls or not isinstance(arguments, list):
            raise ChannelClosedError(f"a call of {name!r:.50}")
        try:
            inspect.signature(self._calls[name]).bind(*arguments)
        except TypeError as error:
            raise ChannelClosedError(f"a call of {name} with {len(arguments)} arguments") from error
        try:
            self._worker.reply(self._result_of(self._calls[name], arguments))
        except ValueError as error:
            self._worker.reply(str(error), error=True)

    def _result_of(self, function: Callable[..., Any], arguments: Any) -> Any:
        """What a function of the parent returns, once it can."""
        try:
            return function(*arguments)
        except NotReady:
            self._schedule.set_waiting(self._turn, True)
        try:
            return retry_until_ready(function, arguments, self._check_memory)
        finally:
            self._schedule.set_waiting(self._turn, False)

    def _array(self, shape: Any) -> None:
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
            raise ChannelClosedError(f"an array of {shape!r:.50}")
        size = int(np.prod([1, *shape], dtype=object))
        self._room -= size
        if self._room < 0 or len(self._arrays) == MAX_ARRAYS:
            raise ChannelClosedError(f"an array of {size:,} bytes after {len(self._arrays)} others")
        self._take_array()
        file = SharedFile.of_size(max(size, 1))
        # A file with a name (Windows) has to be there until the worker has opened it.
        self._files.callback(file.close)
        memory = file.map()
        self._worker.reply_file(file)
        if file.path is None:
            self._files.close()
        self._shared = np.frombuffer(memory, np.uint8, size).reshape(shape)

    def _take_array(self) -> None:
        """Copy the array that was made last: its mapping keeps a descriptor open, and the process could write to it."""
        if self._shared is not None:
            self._arrays.append(np.array(self._shared))
            self._shared = None


class LocalJob:
    """The same for functions that run in this process: nothing limits them but what they check themselves."""

    remote = False

    def __init__(self, files: Sequence[bytes | SharedFile], calls: Calls):
        self._files, self._calls = files, calls
        self._lock = threading.Lock()
        self.arrays: list[np.ndarray] = []

    def file(self, index: int = 0) -> BinaryIO:
        return open_reader(self._files[index])

    def call(self, name: str, *arguments: Any) -> Any:
        with self._lock:
            return retry_until_ready(self._calls[name], arguments, check_cancelled)

    def array(self, shape: Sequence[int]) -> np.ndarray:
        array = np.zeros(shape, np.uint8)
        with self._lock:
            self.arrays.append(array)
        return array
