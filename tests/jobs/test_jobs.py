"""Jobs: journals that survive truncation, and a runner that processes every item once despite failures."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from aria.jobs import BatchJob, Journal
from aria.jobs.runner import MAX_HEAVY_IN_FLIGHT

if sys.platform != "win32":
    import resource

RECORDS = [
    {"path": "a.png", "text": "ein Wort {\n}"},
    {"path": "b.png", "text": "日本\u2028語"},
    {"path": "c", "text": None},
]


def write_all(path, records) -> None:
    with Journal(path) as journal:
        assert list(journal.read()) == []
        for record in records:
            journal.write(record)


def read_all(path) -> list[dict[str, Any]]:
    with Journal(path) as journal:
        return list(journal.read())


def test_a_journal_truncated_anywhere_is_repaired(tmp_path):
    path = tmp_path / "out.jsonl"
    write_all(path, RECORDS)
    complete = path.read_bytes()
    ends = [at for at in range(len(complete) + 1) if complete[:at].endswith(b"\n")]
    for cut in range(len(complete) + 1):
        path.write_bytes(complete[:cut])
        with Journal(path) as journal:
            kept = list(journal.read())
            # A line that lacks only its newline is complete: no proper prefix of an object is an object.
            assert kept == RECORDS[: sum(end - 1 <= cut for end in ends)]
            for record in RECORDS[len(kept) :]:
                journal.write(record)
        assert path.read_bytes() == complete


@pytest.mark.parametrize("content", [b'[1, 2]\n{"path": 1}\n', b"{\n  1: 2\n}\n", b"\x89PNG\r\n\x1a\n", b"text", b"\n"])
def test_other_files_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"line 1 of .*other is not a JSON object"):
        read_all(path)
    assert path.read_bytes() == content


def test_a_journal_is_written_by_one_process_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    with Journal(path), pytest.raises(ValueError, match="another process"):
        Journal(path)
    write_all(path, RECORDS)
    assert read_all(path) == RECORDS


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX's")
def test_a_partial_line_on_a_full_disk_is_truncated_at_once(tmp_path):
    """Space is freed, and another thread continues with a line of its own."""
    path = tmp_path / "out.jsonl"
    write_all(path, RECORDS[:1])
    complete = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(path) as journal:
        assert list(journal.read()) == RECORDS[:1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (complete + 10, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                journal.write(RECORDS[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.stat().st_size == complete
        journal.write(RECORDS[2])
    assert read_all(path) == [RECORDS[0], RECORDS[2]]


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_nothing_is_written_after_a_partial_line_that_cannot_be_truncated(tmp_path, monkeypatch, fails):
    path = tmp_path / "out.jsonl"
    write_all(path, RECORDS[:1])
    with Journal(path) as journal:
        list(journal.read())
        file, broken = journal._file, [True]

        class Disk:
            """Accepts ten bytes of a line, and cannot be truncated."""

            def write(self, data) -> int:
                if broken and fails == "write" and len(data) <= 10:
                    raise OSError(errno.EIO, "input/output error")
                return file.write(data[:10] if broken and fails == "write" else data)

            def truncate(self, size: int) -> int:
                if broken:
                    raise OSError(errno.EIO, "input/output error")
                return file.truncate(size)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        def sync(descriptor: int) -> None:
            if broken and fails == "fsync":
                raise OSError(errno.EIO, "input/output error")

        monkeypatch.setattr(journal, "_file", Disk())
        monkeypatch.setattr(os, "fsync", sync)
        record = {"path": "x" * 15}
        with pytest.raises(OSError, match=r"^.Errno 5. input/output error"):
            journal.write(record)
        with pytest.raises(OSError, match=r"a partial line cannot be truncated .*out\.jsonl"):
            journal.write(RECORDS[1])
        assert path.read_bytes().count(b"\n") == (1 if fails == "write" else 2)
        broken.clear()
        journal.write(RECORDS[2])
    assert read_all(path) == [RECORDS[0], RECORDS[2]]


def test_names_that_are_not_unicode_are_kept(tmp_path):
    record = {"path": "photo-\udcff.png"}
    write_all(tmp_path / "out.jsonl", [record])
    (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert read_all(tmp_path / "out.jsonl") == [record]


def test_nothing_is_written_after_closing(tmp_path):
    journal = Journal(tmp_path / "out.jsonl")
    assert list(journal.read()) == []
    journal.close()
    with pytest.raises(OSError, match="was closed"):
        journal.write({"path": "late"})


class Memory:
    """Output in memory."""

    def __init__(self, *records: dict[str, Any]):
        self.records = list(records)

    def read(self):
        return iter(list(self.records))

    def write(self, record) -> None:
        self.records.append(dict(record))


class Play:
    """A task without a model: items are numbers, and negative ones are heavy.

    With ``together``, light items wait until that many are in flight.
    """

    def __init__(self, fails: Callable[[int, int], bool] = lambda item, attempt: False, together: int = 0):
        self.fails, self.together, self.met = fails, together, asyncio.Event()
        self.attempts: dict[int, int] = {}
        self.flying: list[int] = []
        self.most = self.most_heavy = 0

    def name(self, item: int) -> str:
        return str(item)

    def heavy(self, item: int) -> bool:
        return item < 0

    async def do(self, engine: Any, item: int) -> dict[str, Any]:
        self.attempts[item] = self.attempts.get(item, 0) + 1
        self.flying.append(item)
        self.most = max(self.most, len(self.flying))
        self.most_heavy = max(self.most_heavy, sum(one < 0 for one in self.flying))
        if self.together and item > 0:
            if len(self.flying) == self.together:
                self.met.set()
            await asyncio.wait_for(self.met.wait(), 60)
        alone = len(self.flying) == 1
        for _ in range(1 + abs(item) % 5):
            await asyncio.sleep(0)
            alone = alone and len(self.flying) == 1
        self.flying.remove(item)
        if self.fails(item, self.attempts[item]):
            raise RuntimeError(f"the engine fails at {item}")
        return {"name": str(item), "failed": False, "alone": alone}

    def give_up(self, item: int, error: Exception) -> dict[str, Any]:
        return {"name": str(item), "failed": True, "error": str(error)}

    def recognize(self, record) -> tuple[str, bool]:
        return record["name"], record["failed"]

    def changed(self, item: int, record) -> str | None:
        return record.get("changed")


def do(play: Play, items, output: Memory, at_once: int = 4) -> BatchJob:
    job = BatchJob(play, items, output)
    asyncio.run(job.run(None, at_once=at_once))  # type: ignore[arg-type]  (Play needs no engine)
    return job


def test_every_item_is_processed_once_with_bounded_concurrency():
    play, output = Play(together=7), Memory()
    items = [*range(-20, 0), *range(1, 40)]
    job = do(play, items, output, at_once=7)
    assert sorted(int(record["name"]) for record in output.records) == items
    assert set(play.attempts.values()) == {1}
    assert play.most == 7
    assert play.most_heavy == MAX_HEAVY_IN_FLIGHT
    assert (job.counts.done, job.counts.before, job.counts.failed) == (len(items), 0, 0)


def test_items_in_the_output_are_skipped():
    play = Play()
    output = Memory({"name": "3", "failed": False}, {"name": "5", "failed": True}, {"name": "99", "failed": True})
    job = do(play, range(1, 9), output)
    assert sorted(play.attempts) == [1, 2, 4, 6, 7, 8]
    # Records of other items do not matter.
    assert (job.counts.done, job.counts.before, job.counts.failed) == (6, 1, 1)


def test_changed_items_are_named_and_nothing_is_processed():
    records = [{"name": str(i), "failed": False, "changed": "the content"} for i in range(1, 14)]
    records += [{"name": "14", "failed": True, "changed": "the request"}, {"name": "15", "failed": False}]
    records += [{"name": "99", "failed": False, "changed": "the content"}]  # of an item that is no longer in the list
    with pytest.raises(ValueError, match=r"changed: the content of '1', .*'10' and 3 more; the request of '14'\. Name"):
        BatchJob(Play(), range(1, 21), Memory(*records))


def test_items_affected_by_a_failure_are_retried_alone():
    play, output = Play(lambda item, attempt: item in (2, 3) and attempt == 1), Memory()
    job = do(play, range(1, 20), output)
    records = {int(record["name"]): record for record in output.records}
    assert sorted(records) == list(range(1, 20))
    assert records[2]["alone"] and records[3]["alone"]
    assert job.counts.failed == 0


def test_an_item_that_breaks_the_engine_twice_is_given_up():
    play, output = Play(lambda item, attempt: item == 2), Memory()
    job = do(play, range(1, 20), output)
    [bad] = [record for record in output.records if record["failed"]]
    assert bad == {"name": "2", "failed": True, "error": "the engine fails at 2"}
    assert play.attempts[2] == 2
    assert (job.counts.done, job.counts.failed) == (18, 1)


def test_a_broken_engine_ends_the_job_without_giving_up_items():
    play, output = Play(lambda item, attempt: item > 10), Memory()
    with pytest.raises(RuntimeError, match="the engine fails at"):
        do(play, range(1, 200), output, at_once=4)
    # An item in flight at that moment may be missing; it is processed next time.
    assert {int(record["name"]) for record in output.records} <= set(range(1, 11))
    assert not any(record["failed"] for record in output.records)
    assert len(play.attempts) < 40


def test_a_record_that_cannot_be_written_ends_the_job():
    class Full(Memory):
        def write(self, record) -> None:
            if len(self.records) == 3:
                raise OSError("no space left")
            super().write(record)

    output = Full()
    with pytest.raises(OSError, match="no space left"):
        do(Play(), range(1, 50), output)
    assert len(output.records) == 3


def test_lines_are_plain_json(tmp_path):
    write_all(tmp_path / "out.jsonl", RECORDS)
    lines = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == RECORDS
    assert lines[-1] == b""
