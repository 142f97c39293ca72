"""Functions that tests run in worker processes. Nothing here imports PyTorch or pytest."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def double(job: Any, number: int) -> dict[str, Any]:
    return {"double": 2 * number, "pid": os.getpid(), "read": job.file().read().decode()}


def add(job: Any, first: int) -> int:
    return first + job.call("second", "argument")


def fill(job: Any, count: int) -> int:
    for value in range(count):
        job.array((value + 1, 3))[:] = value
    return count


def count_files(job: Any, count: int) -> list[int]:
    """Return the parent's numbers of open descriptors while arrays are made."""
    return [job.array((1,)) is not None and job.call("files") for _ in range(count)]


def spin(job: Any) -> None:
    """Compute without releasing the interpreter, like some decoders."""
    job.call("began", os.getpid())
    pow(3, 10**10)


def hold(job: Any, count: int) -> None:
    """Compute with a large amount of memory."""
    held = bytearray(count)
    for at in range(0, count, 4096):
        held[at] = 1
    job.call("began", os.getpid())
    pow(3, 10**10)


def sleep(job: Any) -> None:
    """Sleep without releasing the interpreter."""
    ctypes.PyDLL(None).sleep(1000)


def compute(job: Any, seconds: float) -> float:
    """Use ``seconds`` of CPU time."""
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass
    return seconds


def crash(job: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV) if not hasattr(ctypes, "string_at") else ctypes.string_at(0)


def refuse(job: Any) -> None:
    raise ValueError("it is blue; expected green")


def fail(job: Any) -> None:
    raise KeyError("a mistake")


def allocate(job: Any, count: int) -> int:
    return len(bytes(count))


def lie(job: Any) -> None:
    job._channel.send(b'{"result": ' + b"[" * 100_000)
    time.sleep(1000)


def huge_array(job: Any) -> None:
    job.array((1 << 39,))


def odd_array(job: Any) -> None:
    job.array((True, 2))


def odd_call(job: Any) -> None:
    job.call("second", 1, 2, 3)


def unknown_call(job: Any) -> None:
    job.call("system", "rm")


def environment(job: Any) -> dict[str, str]:
    return dict(os.environ)


def read_file(job: Any, path: str) -> str:
    return _attempt(lambda: Path(path).read_text())


def write_file(job: Any, path: str) -> str:
    return _attempt(lambda: Path(path).write_text("x"))


def write_scratch(job: Any) -> str:
    with tempfile.NamedTemporaryFile() as file:
        return _attempt(lambda: file.write(b"x"))


def connect(job: Any, port: int) -> str:
    return _attempt(lambda: socket.create_connection(("127.0.0.1", port), timeout=1))


def start_process(job: Any) -> str:
    return _attempt(lambda: os.posix_spawn("/bin/true", ["true"], {}))


def fork(job: Any) -> str:
    def run() -> None:
        if os.fork() == 0:
            os._exit(0)

    return _attempt(run)


def kill(job: Any, pid: int) -> str:
    return _attempt(lambda: os.kill(pid, 0))


def start_thread(job: Any) -> str:
    thread = threading.Thread(target=lambda: None)
    return _attempt(thread.start)


def open_many(job: Any) -> str:
    return _attempt(lambda: [os.dup(0) for _ in range(10_000)])


def _attempt(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "done"


def crash_trial(job: Any, name: str, text: str) -> None:
    """Replaces the trial of a grammar."""
    crash(job)


def hang_trial(job: Any, name: str, text: str) -> None:
    compute(job, 1000)
