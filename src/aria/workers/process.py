"""Worker processes as seen by the parent: starting, pausing, killing and communicating."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import psutil

from aria.workers.channel import PASSES_FILES, Channel, ChannelClosedError
from aria.workers.shared import SharedFile

logger = logging.getLogger(__name__)

MAX_ANSWER = 8 << 20
"""Maximum bytes of a message from a worker, which may be compromised by the file that it reads."""
START_SECONDS = 60.0
FORKS = sys.platform == "linux" and hasattr(os, "pidfd_open")
"""Whether workers are forked by a fork server. On macOS some libraries fail in forked processes."""
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "TEMP",
                   "TMP", "SYSTEMROOT", "PATHEXT", "FONTCONFIG_PATH")  # fmt: skip
"""Environment variables passed on to workers. Others may hold secrets."""
_NICE = 10
_KEPT_BYTES = 32 << 20


class WorkerError(RuntimeError):
    """A worker process cannot be started, or ended for reasons other than its input."""


class BusyError(WorkerError):
    """A job timed out because other jobs used the workers or the memory."""


class Worker:
    """A process that runs one job at a time.

    Args:
        channel: The connection to it.
        pid: Its process id.
        child: The process object, unless the process was forked by the fork server.

    Attributes:
        jobs: Number of jobs it was given.
        slow: Whether its priority was lowered, which cannot be undone.
        missing: Parts of the sandbox that are missing, and why.

    Raises:
        ChannelClosedError: The process ended before it was ready.
    """

    def __init__(self, channel: Channel, pid: int, child: subprocess.Popen[bytes] | None = None):
        self._channel, self._child = channel, child
        self.jobs = 0
        self.slow = False
        # A pid can be reused by another process; this descriptor cannot.
        self._handle = os.pidfd_open(pid) if child is None else None
        try:
            self._process = psutil.Process(pid)
            ready = channel.receive(START_SECONDS)
            if ready is None:
                raise ChannelClosedError(f"it was not ready within {START_SECONDS:g} s")
            self.missing: list[str] = [str(one) for one in json.loads(ready)["ready"]]
        except BaseException:
            self.kill()
            raise

    def start(self, function: str, arguments: Sequence[Any], inputs: Sequence[SharedFile], cpu_seconds: float) -> None:
        """Start a job: a function, as ``module:name``, and its arguments.

        Raises:
            ChannelClosedError: The process has ended.
        """
        self.jobs += 1
        request = {
            "function": function,
            "arguments": arguments,
            "inputs": [(one.path if not PASSES_FILES else None, one.size) for one in inputs],
            "cpu_seconds": cpu_seconds,
        }
        self._channel.send(pickle.dumps(request), [one.descriptor for one in inputs] if PASSES_FILES else ())

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Receive the next message; None if there is none within ``seconds``.

        Raises:
            ChannelClosedError: The process has ended or sent an invalid message.
        """
        message = self._channel.receive(seconds)
        if message is None:
            return None
        try:
            value = json.loads(message)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ChannelClosedError("a message that is not a JSON object")
        return value

    def reply(self, value: Any, *, error: bool = False) -> None:
        """Reply to a call."""
        self._channel.send(pickle.dumps(("error" if error else "value", value)))

    def reply_file(self, file: SharedFile) -> None:
        """Reply to a call with a file."""
        path, files = (None, [file.descriptor]) if PASSES_FILES else (file.path, [])
        self._channel.send(pickle.dumps(("value", path)), files)

    def cpu_seconds(self) -> float:
        """CPU time used by the process; infinity if unknown."""
        try:
            return float(sum(self._process.cpu_times()[:2]))
        except (psutil.Error, OSError):
            return math.inf

    def resident_bytes(self) -> int:
        """Resident memory of the process; 0 if unknown."""
        try:
            return int(self._process.memory_info().rss)
        except (psutil.Error, OSError):
            return 0

    def pause(self) -> None:
        """Suspend the process until :meth:`resume`."""
        self._signal("SIGSTOP", lambda process: process.suspend())

    def resume(self) -> None:
        self._signal("SIGCONT", lambda process: process.resume())

    def lower_priority(self) -> None:
        """Permanently lower the priority of the process below all others."""
        self.slow = True
        with contextlib.suppress(psutil.Error, OSError):
            nice = psutil.IDLE_PRIORITY_CLASS if sys.platform == "win32" else min(self._process.nice() + _NICE, 19)
            self._process.nice(nice)

    def kill(self) -> None:
        """Kill the process."""
        self._signal("SIGKILL", lambda process: process.kill())
        self._channel.close()
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)
        if self._child is not None:
            self._child.wait()

    def _signal(self, name: str, other: Any) -> None:
        with contextlib.suppress(ProcessLookupError, psutil.Error, OSError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, getattr(signal, name))
            elif self._child is not None and self._child.poll() is None:
                other(self._process)


class ForkServer:
    """Starts workers. The server process itself is started with the first one.

    Args:
        memory_bytes: Address space that each worker may use beyond what it starts with.
    """

    def __init__(self, memory_bytes: int):
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._lock = threading.Lock()
        self._closed = False

    def worker(self) -> Worker:
        """Start a worker and wait until it is ready.

        Raises:
            WorkerError: It cannot be started.
        """
        try:
            with self._lock:
                if self._closed:
                    raise WorkerError("the worker pool is closed")
                ours, child = (self._forked if FORKS else self._started)()
            return Worker(Channel(ours, MAX_ANSWER), *child)
        except (OSError, ChannelClosedError, psutil.Error) as error:
            reason = str(error) or "it ended at once"
            raise WorkerError(f"cannot start a worker process: {reason}") from error

    def close(self) -> None:
        """End the fork server; workers that it forked end with it."""
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        if self._channel is not None:
            self._channel.close()  # the process notices and removes its scratch folder
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self._process.kill()
            self._process.wait()
        self._channel = self._process = None

    def _forked(self) -> tuple[socket.socket, tuple[int]]:
        for attempt in range(2):
            if self._process is None or self._process.poll() is not None:
                self._end()
                ours, self._process = _launch("forkserver", self._memory_bytes)
                self._channel = Channel(ours, MAX_ANSWER)
            assert self._channel is not None, "it is made with the process"
            here, there = socket.socketpair()
            try:
                self._channel.send(b"", [there.fileno()])
                pid = self._channel.receive(START_SECONDS)
                if pid is None:
                    raise ChannelClosedError(f"no process within {START_SECONDS:g} s")
                return here, (int(pid),)
            except ChannelClosedError:
                here.close()
                self._end()
                if attempt:
                    raise
            finally:
                there.close()
        raise AssertionError("the second attempt returns or raises")

    def _started(self) -> tuple[socket.socket, tuple[int, subprocess.Popen[bytes]]]:
        ours, process = _launch("worker", self._memory_bytes)
        return ours, (process.pid, process)


def _launch(role: str, memory_bytes: int) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a Python process that runs :mod:`aria.workers.child`; returns the connection to it and the process."""
    ours, theirs = socket.socketpair()
    # Use the module search path of this process, without running the user's main program.
    setup = f"import sys; sys.path[:] = {sys.path!r}; from aria.workers.child import main; main()"
    command = [sys.executable, "-c", setup, role, str(memory_bytes)]
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # Threads would make forking unsafe, and take memory each.
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment |= {"MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    # Let malloc reuse the memory of one image for the next.
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(_KEPT_BYTES), "MALLOC_TRIM_THRESHOLD_": str(2 * _KEPT_BYTES)}
    try:
        with theirs:
            if os.name == "posix":
                command.append(str(theirs.fileno()))
                process = subprocess.Popen(
                    command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            else:
                process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
                assert process.stdin is not None, "a pipe was asked for"
                with process.stdin as pipe:
                    pipe.write(theirs.share(process.pid))  # type: ignore[attr-defined]
    except BaseException:
        ours.close()
        raise
    return ours, process
