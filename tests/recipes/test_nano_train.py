"""The four stages in a row: each starts from the previous one, finished ones are skipped, and a stop resumes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from aria.train.recipe import Recipe
from recipes.nano.train import run as train

NAMES = ["1-language", "2-seeing", "3-long", "4-answers"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; a stage writes its export unless it is stopped."""
    commands: list[list[str]] = []

    def run(arguments: list[str]) -> None:
        commands.append(arguments)
        if "stop.here" not in arguments:
            folder = Path(arguments[arguments.index("--out") + 1]) / train.EXPORT
            folder.mkdir(parents=True)
            (folder / "processor_config.json").write_text("{}")

    monkeypatch.setattr(train, "run", run)
    return commands


def test_stages_run_in_order_and_only_once(
    ran: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(["--out", str(tmp_path), "--set", "budget.minutes=0.5"])
    assert [Path(command[command.index("--out") + 1]).name for command in ran] == NAMES
    for n, command in enumerate(ran):
        assert command[1:4] == ["-m", "aria.cli", "train"]
        settings = [command[i + 1] for i, part in enumerate(command) if part == "--set"]
        recipe = Recipe.read(command[4], settings)
        assert recipe.model.path == (str(tmp_path / NAMES[n - 1] / "export") if n else None)
        assert recipe.budget.minutes == 0.5
    assert str(tmp_path / "4-answers" / "export") in capsys.readouterr().out.splitlines()[-1]
    train.main(["--out", str(tmp_path)])
    assert len(ran) == 4, "finished stages should not run again"


def test_a_stopped_stage_runs_next(ran: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--out", str(tmp_path), "--set", "stop.here"])
    assert len(ran) == 1 and "rerun to resume" in capsys.readouterr().out
    train.main(["--out", str(tmp_path)])
    assert [Path(command[4]).stem for command in ran] == ["1-language", *NAMES]


def test_a_failing_stage_stops_the_run() -> None:
    with pytest.raises(SystemExit, match="3"):
        train.run([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_sigterm_is_forwarded_and_the_stage_can_save(tmp_path: Path) -> None:
    """The stage writes a file at SIGTERM, as training writes its checkpoint, and exits normally."""
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(0)))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )

    def interrupt() -> None:
        while not ready.exists():
            done.wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    done = threading.Event()
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt)
    thread.start()
    train.run([sys.executable, "-c", code])
    thread.join()
    assert saved.exists() and signal.getsignal(signal.SIGTERM) is before
