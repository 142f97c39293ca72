"""Run `aria serve` in a process with a memory limit, measure it, and watch it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

from tests.helpers import repository
from tests.helpers.made_media import clip, pdf
from tests.hostile.bad_media import Medium, kept
from tests.hostile.probe import medium_part

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "examples" / "pictures"
MEMORY = 6 << 30
CHAT = "/v1/chat/completions"
SOURCES = [f"127.0.0.{n}" for n in range(2, 250)] if sys.platform == "linux" else ["127.0.0.1"]
"""Client addresses of the attackers, so that they share no limits with legitimate clients."""


# A limit on memory


class MemoryGroup:
    """A memory cgroup of Linux for a server and all its children; without the rights to create one, it has no effect.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int):
        self.folder: Path | None = None
        name = f"aria-hostile-{os.getpid()}-{time.monotonic_ns()}"
        for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
            folder = Path(root, name)
            try:
                folder.mkdir()
                (folder / file).write_text(str(limit))
            except OSError:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            else:
                self.folder = folder
                break

    def enter(self) -> None:
        """Move this process into it."""
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def kills(self) -> int:
        """Number of its processes that the kernel killed for lack of memory."""
        for file, pattern in (("memory.oom_control", r"oom_kill (\d+)"), ("memory.events", r"oom_kill (\d+)")):
            if self.folder is not None and (self.folder / file).exists():
                found = re.search(pattern, (self.folder / file).read_text())
                return int(found[1]) if found else 0
        return 0

    def remove(self) -> None:
        """To be called when its processes have ended."""
        if self.folder is not None:
            eventually(lambda: self._removed(), 10)

    def _removed(self) -> bool:
        assert self.folder is not None
        with contextlib.suppress(OSError):
            self.folder.rmdir()
        return not self.folder.exists()


def eventually(holds: Callable[[], Any], seconds: float) -> bool:
    """Whether a condition becomes true within ``seconds``."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


# The server


class State(NamedTuple):
    """Resources held by a server."""

    memory: int
    """Resident bytes of its main process."""
    threads: int
    files: int
    """Open ones, and connections."""
    children: int
    scratch: int
    """Files in its temporary folder."""


class Server:
    """A running server. See :func:`running`."""

    def __init__(self, process: subprocess.Popen[str], port: int, scratch: Path, log: Path, group: MemoryGroup):
        self.process, self.port, self.scratch, self.log, self.group = process, port, scratch, log, group
        self.main = psutil.Process(process.pid)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def state(self) -> State:
        main, children, files = self.main, len(self.children()), len(self.files())
        return State(main.memory_info().rss, main.num_threads(), main.num_fds(), children, files)

    def files(self) -> list[str]:
        """Names of the files in its temporary folder."""
        return [name for _, _, names in os.walk(self.scratch) for name in names]

    def children(self) -> list[psutil.Process]:
        """All of its descendant processes."""
        return [child for child in self.main.children(recursive=True) if runs(child)]

    def stop(self, signal: int = signal.SIGTERM, seconds: float = 60.0) -> int | None:
        """Its exit status after a signal; None if it continued for longer than ``seconds``."""
        if self.alive:
            self.process.send_signal(signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-4000:]


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def running(*arguments: str, memory: int = MEMORY, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`aria serve` on nano until the block ends.

    Args:
        arguments: further options.
        memory: bytes that it and its children may take together, or each of them where no cgroup can be made.
        environment: in addition to this process's.
    """
    group = MemoryGroup(memory)

    def confine() -> None:
        group.enter()
        if group.folder is None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))

    with tempfile.TemporaryDirectory(prefix="aria-hostile-") as folder:
        scratch, log = Path(folder, "tmp"), Path(folder, "log")
        scratch.mkdir()
        command = [sys.executable, "-m", "aria", "serve", "--port", "0", "--device", "cpu", *arguments]
        variables = repository.environment(TMPDIR=str(scratch), **(environment or {}))
        with (
            log.open("w") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables, preexec_fn=confine
            ) as process,
        ):
            children: list[psutil.Process] = []
            try:
                assert process.stdout is not None, "it was asked for"
                address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
                assert address is not None, f"the server did not start: {log.read_text()[-4000:]}"
                server = Server(process, int(address[1]), scratch, log, group)
                yield server
                if server.alive:
                    children = server.children()
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(45)
                for left in [process, *filter(runs, children)]:
                    left.kill()
                process.wait()
                group.remove()


# Watching the server


@contextlib.contextmanager
def probe(*arguments: str) -> Iterator[Callable[[], Any]]:
    """A probe (see ``probe.py``); what it yields ends the probe and gives what it found."""
    command = [sys.executable, "-m", "tests.hostile.probe", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=repository.environment()
    ) as process:
        assert process.stdin is not None and process.stdout is not None, "they were asked for"
        said = process.stdout.readline()
        assert said == "ready\n", f"the probe said {said!r}"

        def finish() -> Any:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            return json.loads(process.stdout.read())

        try:
            yield finish
        except BaseException:
            process.kill()
            raise


def questions() -> list[dict[str, Any]]:
    """A question of legitimate clients; ``right`` is a word that must be in the answer."""
    word = np.asarray(Image.open(PICTURES / "word.png").convert("RGB"))
    asked: list[tuple[str, str, bytes, str, str]] = [
        ("text", "", b"", "hello", "Hello"),
        ("picture", "image", (PICTURES / "word.png").read_bytes(), "What does it say?", "Welcome"),
        ("clip", "video", clip(10, draw=lambda _: word), "What does it say?", "Welcome"),
        ("page", "document", pdf((110, 70), text="HELLO"), "What does it say?", "HELLO"),
    ]
    names = ("name", "kind", "data", "text", "right")
    return [dict(zip(names, (*one[:2], base64.b64encode(one[2]).decode(), *one[3:]), strict=True)) for one in asked]


def milliseconds(values: list[float], part: float) -> int:
    return round(1000 * percentile(values, part))


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))] if values else 0.0


@dataclass
class Watched:
    """What happened during an attack; filled when the block of :func:`watching` ends."""

    health: list[float] = field(default_factory=list)
    """Seconds of each response of /health."""
    unhealthy: Counter[int] = field(default_factory=Counter)
    """Its responses other than 200, by status."""
    good: list[float] = field(default_factory=list)
    """Seconds of each correct answer."""
    by_question: dict[str, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    idle: int = 0
    """Resident bytes of the main process before."""
    peak: int = 0
    """Peak memory, beyond ``idle``."""
    whole: int = 0
    """The most that it and its children took, beyond what they took before; shared memory counts for each."""

    def report(self) -> str:
        """A line."""
        health = f"p50 {milliseconds(self.health, 0.5)}, p99 {milliseconds(self.health, 0.99)}"
        good = f"p50 {milliseconds(self.good, 0.5)}, p99 {milliseconds(self.good, 0.99)}"
        return (
            f"health {len(self.health)}: {health} ms; good {len(self.good)}: {good} ms, {len(self.wrong)} wrong; "
            f"memory +{self.peak >> 20} MB, with children +{self.whole >> 20} MB"
        )


@contextlib.contextmanager
def watching(server: Server, clients: int = 1) -> Iterator[Watched]:
    """Watch the health and memory of a server while legitimate clients use it and others attack it."""
    watched = Watched()
    asked = questions()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asked, file)
        file.flush()
        with (
            probe("good", str(server.port), str(clients), file.name) as answers,
            probe("health", str(server.port)) as health,
        ):
            watched.idle = server.main.memory_info().rss
            with _measured(server, watched):
                yield watched
                said = answers()
            for seconds, status in health():
                watched.health.append(seconds)
                if status != 200:
                    watched.unhealthy[status] += 1
    for question in asked:
        text = said["expected"][question["name"]]
        assert question["right"] in text, f"{question['name']} was answered wrongly before the attack: {text!r}"
    for seconds, name, status, text in said["seen"]:
        if text is None:
            watched.good.append(seconds)
            watched.by_question.setdefault(name, []).append(seconds)
        else:
            watched.wrong.append(f"{name}: {status} {text}")


@contextlib.contextmanager
def _measured(server: Server, watched: Watched) -> Iterator[None]:
    """Follow the memory of a server: often, and by the kernel's own high-water mark where there is one."""
    stopped = threading.Event()
    status = Path(f"/proc/{server.process.pid}/status")
    with contextlib.suppress(OSError):
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")

    def high() -> int:
        with contextlib.suppress(OSError, psutil.Error):
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
            return int(found[1]) << 10 if found else server.main.memory_info().rss
        return 0

    def whole() -> int:
        total = 0
        with contextlib.suppress(psutil.Error):
            for process in (server.main, *server.main.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    before = whole()

    def follow() -> None:
        while True:
            watched.peak = max(watched.peak, high() - watched.idle)
            watched.whole = max(watched.whole, whole() - before)
            if stopped.wait(0.1):
                return

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


# Attacking the server


class Outcome(NamedTuple):
    """The outcome of a hostile request."""

    name: str
    status: int
    """0: the connection broke."""
    seconds: float
    message: str


def post(port: int, body: bytes, name: str = "", path: str = CHAT, seconds: float = 400.0, **headers: str) -> Outcome:
    """Send a body, and wait for its end."""
    began = time.monotonic()
    source = (random.choice(SOURCES), 0)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds, source_address=source)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        status, data = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        status, data = 0, repr(error).encode()
    finally:
        connection.close()
    try:
        message = json.loads(data)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = data[:200].decode(errors="replace")
    return Outcome(name, status, time.monotonic() - began, message)


def asking(kind: str, data: bytes, times: int = 1) -> bytes:
    """A request body with a media file."""
    part = medium_part(kind, base64.b64encode(data).decode())
    return json.dumps({"messages": [{"role": "user", "content": [part] * times}], "max_tokens": 1}).encode()


def attack(port: int, media: list[tuple[Medium, int]], folder: Path, together: int = 16) -> list[Outcome]:
    """Send hostile media (and seeds), so many at a time; files that were made are kept in ``folder``."""

    def send(one: tuple[Medium, int]) -> Outcome:
        medium, seed = one
        return post(port, asking(medium.kind, kept(medium, seed, folder)), f"{medium.name} {seed}")

    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(send, media))


PEAK = 300 << 20
"""Memory that an attack may cost the main process."""
