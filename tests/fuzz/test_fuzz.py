"""Fuzz targets take what they are made for; a minute's search for inputs that break them is slow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fuzz import run
from tests.fuzz.target import HERE, NAMES, load, regressions

needs_search = pytest.mark.skipif(not run.can_search(), reason="atheris is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_a_target_takes_its_seeds_and_what_once_broke_it(name):
    target = load(name)
    assert target.seeds
    for data in (*target.seeds, *regressions(name).values()):
        target(data)


def test_regressions_belong_to_targets():
    assert {folder.name for folder in (HERE / "corpus").iterdir()} <= set(NAMES)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"fault", "AssertionError: it came"), (b"memory", "6 bytes of input took")],
    ids=["fault", "memory"],
)
def test_an_input_is_replayed_without_a_search(data, said, tmp_path):
    (tmp_path / "input").write_bytes(data)
    command = [sys.executable, "-m", "tests.fuzz.run", "_broken", "--replay", str(tmp_path / "input")]
    ran = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True)
    assert (ran.returncode, said in ran.stderr) == (1, True), ran.stderr


@needs_search
@pytest.mark.parametrize(("data", "said"), [("crash", "deadly signal"), ("vanish", "status 3")])
def test_an_input_that_ends_the_process_is_kept(data, said, tmp_path, monkeypatch):
    monkeypatch.setenv("BROKEN_BY", data)
    [found], output = run.search("_broken", 20.0, tmp_path)
    assert found.read_bytes() == data.encode()
    assert said in output


@needs_search
@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_a_search_of_a_minute_finds_nothing(name, tmp_path):
    found, said = run.search(name, 60.0, tmp_path)
    assert not said, "\n".join([said, *(f"{file.name}: {file.read_bytes()!r:.2000}" for file in found)])
