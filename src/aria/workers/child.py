"""The code that runs in the processes of :mod:`aria.workers`: the fork server and the workers.

The fork server imports the decoders once and never reads untrusted input, so that a new worker takes milliseconds.
Where processes cannot be forked safely (macOS, Windows), each worker is started as a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from aria.workers.channel import PASSES_FILES, Channel, ChannelClosedError
from aria.workers.sandbox import enter_sandbox, limit_cpu
from aria.workers.shared import SharedFile, map_shared, open_reader

PRELOADED = (
    *("PIL.Image", "av", "pypdfium2", "aria.media.video", "aria.media.document"),
    *("aria.templates", "aria.grammars.trial"),
)
OPTIONAL = ("llguidance",)
"""Modules to preload if they are installed."""
SANDBOX_LIBRARIES = ("py_landlock", "pyseccomp")
"""Loaded before entering the sandbox: pyseccomp runs a program to find its library."""
NICE = 5
"""Niceness of all workers: generation takes precedence over decoding."""
MAX_REQUEST = 1 << 30
"""Maximum bytes of a message from the parent, which is trusted."""
_PR_SET_PDEATHSIG = 1
_SPARE_BYTES = 1 << 20
"""Memory freed when a job runs out of memory, so that this can still be reported."""


class Job:
    """What a function that runs in a worker gets to communicate with the parent.

    Args:
        channel: The connection to the parent.
        inputs: The files that the job may read.
    """

    remote = True
    """Whether the job runs in another process than its caller."""

    def __init__(self, channel: Channel, inputs: Sequence[SharedFile]):
        self._channel, self._inputs = channel, inputs
        self._lock = threading.Lock()

    def file(self, index: int = 0) -> BinaryIO:
        """Open an input file at position 0. Each call returns a file object with its own position."""
        return open_reader(self._inputs[index])

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the parent. Arguments and result are JSON values.

        Raises:
            ValueError: Raised by the function of the parent.
        """
        with self._lock:
            return self._call(name, arguments)

    def array(self, shape: Sequence[int]) -> np.ndarray:
        """Make a zeroed uint8 array that the parent receives with the result, in the order of these calls.

        It must be filled before the next one is made.
        """
        with self._lock:
            path = self._call("array", list(shape))
            descriptor = self._channel.take_file() if path is None else os.open(path, os.O_RDWR | _BINARY)
            try:
                memory = map_shared(descriptor, max(int(np.prod(shape, dtype=object)), 1))
            finally:
                os.close(descriptor)
        return np.frombuffer(memory, np.uint8, int(np.prod(shape))).reshape(shape)

    def _call(self, name: str, arguments: Sequence[Any]) -> Any:
        self._channel.send(json.dumps({"call": name, "arguments": arguments}).encode())
        kind, value = pickle.loads(self._channel.receive() or b"")
        if kind == "error":
            raise ValueError(value)
        return value


_BINARY = getattr(os, "O_BINARY", 0)


def main() -> None:
    """Run a fork server or a worker until its parent ends or closes the connection.

    Command-line arguments: ``forkserver`` or ``worker``; the bytes of address space that each worker may use beyond
    what it starts with; the descriptor of the connection (on Windows absent: the connection comes over standard input).
    """
    role, memory_bytes = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) > 3:
        connection = socket.socket(fileno=int(sys.argv[3]))
    else:
        connection = socket.fromshare(sys.stdin.buffer.read())  # type: ignore[attr-defined]  # there on Windows
    warnings.simplefilter("ignore")  # problems with a file are reported as errors
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this process
    for name in PRELOADED:
        importlib.import_module(name)
    for name in (*OPTIONAL, *SANDBOX_LIBRARIES):
        with contextlib.suppress(Exception):  # missing, or its library is: a worker reports that
            importlib.import_module(name)
    if hasattr(os, "nice"):
        os.nice(NICE)
    channel = _channel(connection)
    scratch = Path(tempfile.mkdtemp(prefix="aria-worker-"))
    try:
        with contextlib.suppress(ChannelClosedError):
            if role == "forkserver":
                _fork_workers(channel, memory_bytes, scratch)
            else:
                _watch_parent()
                _work(channel, memory_bytes, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _channel(connection: socket.socket) -> Channel:
    return Channel(connection, MAX_REQUEST, takes_files=PASSES_FILES)


def _fork_workers(channel: Channel, memory_bytes: int, scratch: Path) -> None:
    """Fork a worker for each connection received."""
    while True:
        channel.receive()
        connection = socket.socket(fileno=channel.take_file())
        _reap()
        pid = os.fork()
        if pid == 0:
            channel.close()
            # The fork server may have ended in between.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                with contextlib.suppress(ChannelClosedError):
                    _work(_channel(connection), memory_bytes, scratch)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        connection.close()
        channel.send(json.dumps(pid).encode())


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch_parent() -> None:
    """Exit as soon as the parent process ends, even during a job."""
    import psutil

    parent = psutil.Process(os.getppid())

    def wait() -> None:
        parent.wait()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _work(channel: Channel, memory_bytes: int, scratch: Path) -> None:
    """Enter the sandbox and run jobs one after another."""
    tempfile.tempdir = str(scratch)
    missing = enter_sandbox(memory_bytes, scratch)
    channel.send(json.dumps({"ready": missing}).encode())
    while True:
        request = pickle.loads(channel.receive() or b"")
        with contextlib.ExitStack() as opened:
            inputs = [SharedFile(_input(channel, path, opened), size) for path, size in request["inputs"]]
            channel.send(json.dumps(_answer(request, Job(channel, inputs))).encode())


def _input(channel: Channel, path: str | None, opened: contextlib.ExitStack) -> int:
    descriptor = channel.take_file() if path is None else os.open(path, os.O_RDONLY | _BINARY)
    opened.callback(os.close, descriptor)
    return descriptor


def _answer(request: dict[str, Any], job: Job) -> dict[str, Any]:
    spare: bytes | None = bytes(_SPARE_BYTES)
    try:
        limit_cpu(request["cpu_seconds"])
        module, _, name = request["function"].partition(":")
        return {"result": getattr(importlib.import_module(module), name)(job, *request["arguments"])}
    except ChannelClosedError:
        raise
    except Exception as error:
        spare = None  # noqa: F841
        if _out_of_memory(error):
            return {"memory": True}
        if isinstance(error, ValueError):
            return {"error": str(error)[:2000]}
        return {"failure": f"{type(error).__name__}: {error}"[:2000]}


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
