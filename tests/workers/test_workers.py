"""Worker processes: their interface, limits, scheduling and sandbox."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from aria.workers import BusyError, NotReady, WorkerError, Workers
from aria.workers import process as processes
from aria.workers.cancellation import Cancelled, run_cancellable
from aria.workers.schedule import QUANTUM, SLICE, JobSchedule
from aria.workers.shared import PositionedReader, SharedFile
from tests.helpers import worker_tasks as tasks
from tests.helpers.repository import environment

ROOM = 1 << 30


@pytest.fixture(scope="module")
def workers():
    workers = Workers(2, ROOM)
    yield workers
    workers.close()


def run(workers: Workers, function: Any, *arguments: Any, seconds: float = 60.0, **options: Any) -> Any:
    return workers.run(function, *arguments, name="the thing", seconds=seconds, **options)[0]


def until(holds: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# What goes in and comes out


def test_arguments_files_calls_and_arrays(workers: Workers) -> None:
    first = run(workers, tasks.double, 4, files=[b"content"])
    assert first["double"] == 8 and first["read"] == "content" and first["pid"] != os.getpid()
    assert run(workers, tasks.double, 1, files=[b""])["pid"] == first["pid"], "processes are used again"
    assert run(workers, tasks.add, 1, calls={"second": lambda text: len(text)}) == 9
    count, arrays = workers.run(tasks.fill, 3, name="x", seconds=60)
    assert count == 3 and [array.tolist() for array in arrays] == [[[n] * 3] * (n + 1) for n in range(3)]


@pytest.mark.skipif(not hasattr(psutil.Process, "num_fds"), reason="descriptors of files")
def test_results_keep_no_files_open(workers: Workers) -> None:
    before = psutil.Process().num_fds()
    kept = [workers.run(tasks.fill, 3, name="x", seconds=60, files=[b"x"])[1] for _ in range(20)]
    assert psutil.Process().num_fds() <= before and kept[0][2].flags.writeable
    counts = run(workers, tasks.count_files, 20, calls={"files": psutil.Process().num_fds})
    assert max(counts) - min(counts) <= 2


def test_a_callback_that_is_not_ready_is_retried(workers: Workers) -> None:
    asked: list[str] = []

    def second(text: str) -> int:
        asked.append(text)
        if len(asked) < 4:
            raise NotReady
        return 1

    assert run(workers, tasks.add, 1, calls={"second": second}) == 2
    with pytest.raises(ValueError, match="too much of it"):
        run(workers, tasks.add, 1, calls={"second": lambda _: (_ for _ in ()).throw(ValueError("too much of it"))})

    def never(_: str) -> int:
        raise NotReady

    with pytest.raises(BusyError, match="try again later"):
        run(workers, tasks.add, 1, calls={"second": never}, seconds=0.3)


def test_readers_of_one_file_have_separate_positions() -> None:
    file = SharedFile.of_bytes(b"0123456789")
    first, second = PositionedReader(file.descriptor, file.size), PositionedReader(file.descriptor, file.size)
    assert first.read(4) == b"0123" and second.read(2) == b"01" and first.read() == b"456789"
    assert second.seek(-3, os.SEEK_END) == 7 and second.read(100) == b"789" and second.read(1) == b""
    assert second.seek(1) == 1 and second.seek(2, os.SEEK_CUR) == 3 and second.tell() == 3
    with pytest.raises(OSError, match="before the beginning"):
        second.seek(-1)
    file.close()


# How it ends


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (tasks.crash, (), "the thing cannot be read: the process that read it crashed"),
        (tasks.refuse, (), "^it is blue; expected green$"),
        (tasks.fail, (), "the thing cannot be read: KeyError"),
        (tasks.allocate, (4 << 30,), "takes more than the 1,073,741,824 bytes of memory"),
        (tasks.lie, (), "the process that read it crashed"),
        (tasks.huge_array, (), "the process that read it crashed"),
        (tasks.odd_array, (), "the process that read it crashed"),
        (tasks.unknown_call, (), "the process that read it crashed"),
        (tasks.odd_call, (), "the process that read it crashed"),
    ],
)
def test_errors_become_value_errors_and_the_next_job_runs(
    workers: Workers, function: Any, arguments: tuple[Any, ...], message: str
) -> None:
    if function is tasks.allocate and sys.platform != "linux":
        pytest.skip("address space is limited on Linux")
    with pytest.raises(ValueError, match=message):
        run(workers, function, *arguments, calls={"second": len})
    assert run(workers, tasks.double, 1, files=[b""])["double"] == 2


def test_a_process_is_killed_at_its_deadline(workers: Workers) -> None:
    pids: list[int] = []
    with pytest.raises(ValueError, match=r"reading the thing took longer than 0.5 s"):
        run(workers, tasks.spin, calls={"began": pids.append}, seconds=0.5)
    until(lambda: is_gone(pids[0]), 5)


@pytest.mark.slow
def test_a_job_that_got_no_cpu_time_gets_more_time(workers: Workers) -> None:
    begin = time.monotonic()
    with pytest.raises(BusyError, match=r"reading the thing took longer than 0.5 s; the server is busy, try again"):
        run(workers, tasks.sleep, seconds=0.5)
    assert time.monotonic() - begin > 1.4


def test_a_process_whose_caller_is_cancelled_is_killed(workers: Workers) -> None:
    import asyncio

    pids: list[int] = []
    ended: list[BaseException] = []

    def work() -> None:
        try:
            run(workers, tasks.spin, calls={"began": pids.append})
        except BaseException as error:
            ended.append(error)
            raise

    async def leave() -> None:
        task = asyncio.create_task(run_cancellable(None, work))
        while not pids:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    until(lambda: ended, 2)
    assert isinstance(ended[0], Cancelled)
    until(lambda: is_gone(pids[0]), 5)


def test_closing_ends_all_processes() -> None:
    workers = Workers(1, ROOM)
    pids: list[int] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            run(workers, tasks.spin, calls={"began": pids.append})
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: pids)
    workers.close()
    thread.join(10)
    assert isinstance(errors[0], WorkerError) and is_gone(pids[0])
    with pytest.raises(WorkerError, match="pool is closed"):
        run(workers, tasks.double, 1, files=[b""])


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_no_processes_remain_when_the_program_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import sys
        from tests.helpers import worker_tasks
        from aria.workers import Workers

        def began(pid):
            print(pid, flush=True)

        workers = Workers(1, 1 << 30)
        workers.run(worker_tasks.spin, name="x", seconds=600, calls={"began": began})
        """)
    )
    child = subprocess.Popen(
        [sys.executable, str(program)],
        env=environment(TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    started = psutil.Process(child.pid).children(recursive=True)
    assert pid in [one.pid for one in started] and list(tmp_path.glob("aria-worker-*"))
    child.send_signal(signal.SIGKILL)
    child.wait()
    until(lambda: all(is_gone(one.pid) for one in started))
    assert not list(tmp_path.glob("aria-worker-*")), "the scratch folder goes with the last process"


# Who runs when


class FakeWorker:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.slow = False

    def pause(self) -> None:
        self.events.append("pause")

    def resume(self) -> None:
        self.events.append("resume")

    def lower_priority(self) -> None:
        self.slow = True


def test_jobs_that_ran_least_run_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    schedule = JobSchedule(1)
    long, worker = schedule.enter(), FakeWorker()
    schedule.set_worker(long, worker)  # type: ignore[arg-type]
    now[0] = 10 * QUANTUM
    schedule.update()
    assert long.runs.is_set() and worker.slow
    short = schedule.enter()
    assert short.runs.is_set() and not long.runs.is_set() and worker.events[-1] == "pause"
    third = schedule.enter()
    now[0] += SLICE
    assert not third.runs.is_set(), "among jobs that have run as little, who came first"
    schedule.set_waiting(short, True)
    assert third.runs.is_set()
    schedule.leave(third)
    schedule.leave(short)
    assert long.runs.is_set() and worker.events[-1] == "resume"
    now[0] += SLICE
    other = schedule.enter()
    assert other.runs.is_set()
    now[0] += 20 * QUANTUM
    schedule.update()
    assert long.runs.is_set() and not other.runs.is_set(), "now that one has run longer"


def test_a_stream_of_new_jobs_starves_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    schedule = JobSchedule(1)
    old = schedule.enter()
    ran = 0
    for _ in range(300):
        new = schedule.enter()
        now[0] += 0.05
        schedule.update()
        ran += old.runs.is_set()
        schedule.leave(new)
    assert ran > 20


def test_memory_of_paused_jobs_is_limited() -> None:
    workers = Workers(1, 400 << 20)
    pids: list[int] = []
    errors: list[Exception] = []

    def hold() -> None:
        try:
            run(workers, tasks.hold, 200 << 20, calls={"began": pids.append}, seconds=60)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: errors, 60)
    assert isinstance(errors[0], BusyError) and "much memory" in str(errors[0])
    workers.close()
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_long_jobs_do_not_keep_short_ones_waiting(workers: Workers) -> None:
    def spin() -> None:
        with pytest.raises((ValueError, BusyError), match="took longer"):
            run(workers, tasks.spin, calls={"began": lambda pid: None}, seconds=3)

    threads = [threading.Thread(target=spin) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    begin = time.monotonic()
    for _ in range(5):
        assert run(workers, tasks.compute, 0.01) == 0.01
    waited = time.monotonic() - begin
    for thread in threads:
        thread.join()
    assert waited < 3, "six jobs of three seconds and more have two places"


# What it may not do


def test_the_environment_has_no_secrets(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARIA_API_KEY", "secret")
    fresh = Workers(1, ROOM)
    assert "ARIA_API_KEY" not in run(fresh, tasks.environment)
    fresh.close()


@pytest.fixture(scope="module")
def confined(workers: Workers) -> str:
    """Parts of the sandbox that are missing here."""
    worker = workers._fork_server.worker()
    missing = " ".join(worker.missing)
    worker.kill()
    return missing


@pytest.fixture
def landlock(confined: str) -> None:
    if "landlock" in confined:
        pytest.skip(f"this system has no {confined}")


@pytest.fixture
def seccomp(confined: str) -> None:
    if "seccomp" in confined:
        pytest.skip(f"this system has no {confined}")


@pytest.mark.usefixtures("landlock")
def test_files_are_out_of_reach(workers: Workers, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    assert run(workers, tasks.read_file, str(secret)) == "PermissionError"
    assert run(workers, tasks.read_file, "/etc/passwd") == "PermissionError"
    assert run(workers, tasks.write_file, str(tmp_path / "new")) == "PermissionError"
    assert run(workers, tasks.write_file, tasks.__file__) == "PermissionError"
    assert run(workers, tasks.write_scratch) == "done"


@pytest.mark.usefixtures("landlock", "seccomp")
def test_network_programs_and_other_processes_are_out_of_reach(workers: Workers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert run(workers, tasks.connect, server.getsockname()[1]) == "PermissionError"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert run(workers, tasks.start_process) == "PermissionError"
    assert run(workers, tasks.fork) == "PermissionError"
    assert run(workers, tasks.kill, os.getpid()) == "PermissionError"
    assert run(workers, tasks.start_thread) == "done"


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
def test_open_files_are_limited(workers: Workers) -> None:
    assert run(workers, tasks.open_many) == "OSError"


# Other systems


def test_without_forking_each_worker_is_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FORKS", False)
    workers = Workers(1, ROOM)
    first = run(workers, tasks.double, 4, files=[b"content"])
    assert first["double"] == 8 and run(workers, tasks.double, 1, files=[b""])["pid"] == first["pid"]
    pids: list[int] = []
    with pytest.raises(ValueError, match="took longer"):
        run(workers, tasks.spin, calls={"began": pids.append}, seconds=0.5)
    assert is_gone(pids[0])
    workers.close()
    assert is_gone(first["pid"])


def test_missing_sandbox_parts_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    real = processes.Worker.__init__

    def lacking(self: Any, *given: Any) -> None:
        real(self, *given)
        self.missing = ["landlock (files and network): the kernel has none", "seccomp (system calls): No module"]

    monkeypatch.setattr(processes.Worker, "__init__", lacking)
    workers = Workers(2, ROOM)
    for _ in range(3):
        with pytest.raises(ValueError, match="crashed"):
            run(workers, tasks.crash)
    workers.close()
    [line] = [record.getMessage() for record in caplog.records]
    assert "landlock (files and network): the kernel has none; seccomp" in line


def test_missing_parts_of_the_sandbox_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a separate process, because entering the sandbox is irrevocable."""
    program = """
        import sys
        from pathlib import Path
        from aria.workers.sandbox import enter_sandbox
        sys.modules["py_landlock"] = None
        sys.modules["pyseccomp"] = None
        missing = enter_sandbox(1 << 40, Path(sys.argv[1]))
        assert [one.split(" (")[0] for one in missing] == ["landlock", "seccomp"], missing
        for system in ("darwin", "win32"):
            sys.platform = system
            missing = enter_sandbox(1 << 40, Path(sys.argv[1]))
            assert len(missing) == (3 if system == "darwin" else 2), missing
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
