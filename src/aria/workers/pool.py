"""`Workers`: a pool of sandboxed worker processes with scheduling, deadlines and memory limits."""

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
"""Maximum seconds between two checks for cancellation and scheduling."""
MAX_JOBS = 64
"""Maximum number of jobs in progress, running or paused. Further jobs wait."""
MAX_ARRAYS = 10_000
"""Maximum number of arrays of one job."""
JOBS_OF_A_WORKER = 500
"""Number of jobs after which a worker process is replaced, in case it leaks memory."""

Calls = Mapping[str, Callable[..., Any]]


class Workers:
    """A pool of worker processes for functions that read untrusted input. Processes are started on demand.

    Args:
        count: Number of jobs that run at a time. Long-running jobs are paused in favour of new ones.
        memory_bytes: Address space that a worker may use beyond what it starts with.
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
            function: A function at the top level of a module.
            arguments: Picklable values.
            name: Name of the input for error messages.
            seconds: Time limit from now, after which the worker is killed. Three times as long if the job got less than
                half of this as CPU time because of other load.
            files: The files that ``job.file(index)`` opens.
            calls: The functions that ``job.call`` can call. They run in this thread. A ValueError is raised in the
                worker; any other exception ends the job and is raised here. A worker may be compromised by its input,
                so arguments can be any JSON.

        Returns:
            The return value of the function as JSON, and the arrays made with ``job.array``.

        Raises:
            ValueError: The function raised one, took too long or too much memory, or its process died.
            BusyError: Other jobs left no time or memory.
            WorkerError: No worker process can be started.
            Cancelled: The caller was cancelled, see :mod:`aria.workers.cancellation`.
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
                    raise WorkerError("the worker pool is closed") from error
                raise ValueError(
                    f"{name} cannot be read: the process that read it crashed, probably because it is damaged or "
                    "malicious; send something else"
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
        """Number of workers that have a job."""
        return len(self._busy)

    def warm_up(self) -> None:
        """Start a worker now, so that the first job need not wait for it.

        Raises:
            WorkerError: It cannot be started.
        """
        self._give_back(self._take(), healthy=True)

    def close(self) -> None:
        """Kill all workers. Running jobs fail."""
        with self._lock:
            self._closed = True
            workers = [*self._idle, *self._busy]
            self._idle.clear()
        for worker in workers:
            worker.kill()
        self._fork_server.close()

    def bound_memory(self, worker: Worker, *, paused: bool) -> None:
        """Abort a paused job if all paused jobs together exceed the memory limit of one worker and it holds the most.

        Raises:
            BusyError: The job is aborted.
        """
        held = worker.resident_bytes() if paused else 0
        with self._lock:
            self._paused[worker] = held
            together, most = sum(self._paused.values()), max(self._paused.values())
        if together > self.memory_bytes and held == most:
            raise BusyError("media being read use too much memory; try again later")

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
            logger.warning("the sandbox of worker processes is incomplete here: %s", "; ".join(worker.missing))
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
        """Wait for a condition.

        Raises:
            BusyError: The time is up.
            Cancelled: The caller was cancelled.
        """
        while not ready():
            check_cancelled()
            if deadline.last < time.monotonic():
                raise BusyError("too many media are being read; try again later")
            self._schedule.update()
            time.sleep(0.005)


class NotReady(Exception):  # noqa: N818
    """Raised by a callback of a job that has to wait. It is called again until it returns or the job ends."""


def retry_until_ready(function: Callable[..., Any], arguments: Sequence[Any], check: Callable[[], None]) -> Any:
    """Call a function until it no longer raises :class:`NotReady`. ``check`` is called in between and may raise."""
    while True:
        with contextlib.suppress(NotReady):
            return function(*arguments)
        check()
        time.sleep(0.02)


class _JobDeadline:
    """Time limit of a job: ``end`` if it got enough CPU time, otherwise ``last``, after three times as long."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.last = self.end + 2 * seconds


class _InputError(Exception):
    """The function of a job raised a ValueError about its input. The worker can be reused."""


class _JobSession:
    """The parent's side of a running job: answers calls, makes arrays and receives the result."""

    def __init__(
        self, workers: Workers, worker: Worker, turn: JobSlot, name: str, calls: Calls, deadline: _JobDeadline
    ):
        self._workers, self._schedule, self._worker, self._turn = workers, workers._schedule, worker, turn
        self._array_bytes_left = workers.memory_bytes
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
                    f"{self._name} cannot be read: it takes more than the {self._workers.memory_bytes:,} bytes of "
                    "memory allowed; make it smaller"
                )
            elif "error" in message:
                raise _InputError(str(message["error"]))
            else:
                logger.error("reading %s failed: %s", self._name, message.get("failure"))
                raise ValueError(f"{self._name} cannot be read: {message.get('failure')}")

    def _check_memory(self) -> None:
        check_cancelled()
        if self._deadline.last < time.monotonic():
            raise BusyError("too many media are being read for the memory available; try again later")

    def _check(self) -> None:
        check_cancelled()
        now, seconds = time.monotonic(), self._deadline.seconds
        # A job that got too little CPU time because of others gets more time.
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
        """Call a function of the parent, waiting until it is ready."""
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
        self._array_bytes_left -= size
        if self._array_bytes_left < 0 or len(self._arrays) == MAX_ARRAYS:
            raise ChannelClosedError(f"an array of {size:,} bytes after {len(self._arrays)} others")
        self._take_array()
        file = SharedFile.of_size(max(size, 1))
        # A named file (Windows) must exist until the worker has opened it.
        self._files.callback(file.close)
        memory = file.map()
        self._worker.reply_file(file)
        if file.path is None:
            self._files.close()
        self._shared = np.frombuffer(memory, np.uint8, size).reshape(shape)

    def _take_array(self) -> None:
        """Copy the last array: its mapping keeps a descriptor open, and the worker could still write to it."""
        if self._shared is not None:
            self._arrays.append(np.array(self._shared))
            self._shared = None


class LocalJob:
    """The interface of :class:`~aria.workers.child.Job` for functions that run in this process, without limits."""

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
