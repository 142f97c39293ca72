"""Metrics and logs of a training: their errors never end it."""

from __future__ import annotations

import io
import resource
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from aria.train.curve import LossCurve
from aria.train.progress import JsonLines, Reporter, Wandb, append_lines

LINES = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]


class WandbError(Exception):
    """No OSError."""


def test_sinks_that_fail_are_a_warning_each_and_the_others_write_on(tmp_path):
    def fails(*_):
        raise WandbError("no connection")

    shown, log = io.StringIO(), tmp_path / "log.jsonl"
    far = SimpleNamespace(write=fails, close=fails)
    gone = JsonLines(tmp_path / "deleted" / "log.jsonl", 0)
    reporter = Reporter([far, gone, JsonLines(log, 0)], Console(file=shown, width=200))
    for line in LINES:
        reporter.write(line)
    reporter.close()
    assert len(log.read_text(encoding="utf-8").splitlines()) == 3
    output = shown.getvalue()
    assert (
        output.count("could not be written: no connection") == output.count("could not be finished: no connection") == 1
    )
    assert output.count("JsonLines could not be written: [Errno 2]") == 1


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_closed_console_is_silent(tmp_path, monkeypatch, error, terminal):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

        def flush(self):
            raise error

    monkeypatch.setattr("os.dup2", lambda *_: None)  # Rich points standard output elsewhere
    log = tmp_path / "log.jsonl"
    reporter = Reporter([JsonLines(log, 0)], Console(file=Gone()))
    if terminal:
        there = Console(file=io.StringIO(), force_terminal=True)
        reporter.console = there
        reporter.start(0.0)
        there.file = Gone()
    for line in LINES:
        reporter.write(line)
    reporter.say("done")
    reporter.close()
    assert len(log.read_text(encoding="utf-8").splitlines()) == 3


def test_lines_are_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "lines"
    append_lines(file, ["one", "zwölf"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="only 5 of 13 bytes"):
            append_lines(file, ["thirteen", "four"[:3]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_lines(file, ["end"])
    assert file.read_text(encoding="utf-8") == "one\nzwölf\nend\n"


@pytest.mark.parametrize("torn", [b"", b'{"step": 1', b"x" * 9000])
def test_lines_never_follow_half_a_line(tmp_path, torn):
    """Left by a write that could not be undone."""
    file = tmp_path / "lines"
    for before in (b"", b"one\n"):
        file.write_bytes(before + torn)
        append_lines(file, ["two"])
        assert file.read_bytes() == before + b"two\n"


def test_a_line_that_was_cut_short_is_not_in_the_curve(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n{"step": 4')
    LossCurve(log).close()
    rows = (tmp_path / "loss.tsv").read_text(encoding="utf-8").splitlines()
    assert [row.split("\t")[:2] for row in rows[1:]] == [["1", "2.0"], ["3", "1.0"]]


def test_the_wandb_id_of_an_untrusted_run_is_checked(tmp_path, monkeypatch):
    """wandb makes a path and a URL of it."""
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: begun.append(settings["id"])))
    Wandb(tmp_path, "project", {})
    Wandb(tmp_path, "project", {})
    assert len(set(begun)) == 1 and len(begun[0]) == 16
    for odd in ("../../../other", "", "a b", "x" * 65):
        (tmp_path / "wandb-id").write_text(odd)
        with pytest.raises(ValueError, match="is not the id of a wandb run; delete it"):
            Wandb(tmp_path, "project", {})
    assert len(begun) == 2
