"""The cookbook: its scripts run on nano, its pages show what the scripts do, its links and options lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import av
import pytest
import typer.main

from aria import cli
from aria.serve.batch import BatchFile, find_lines
from aria.serve.settings import ServerSettings

COOKBOOK = Path(__file__).parents[2] / "docs" / "cookbook"
SCRIPTS = sorted(COOKBOOK.glob("*.py"))
PAGES = sorted(COOKBOOK.glob("*.md"))


@pytest.fixture
def play(monkeypatch, capsys, tmp_path):
    """Run a script as a person would, from some other folder; gives what it prints."""

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(COOKBOOK / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_a_picture(play):
    assert play("single_picture.py").splitlines() == [
        "Welcome (167 prompt tokens, 8 generated)",
        "A red circle. (189 prompt tokens, 14 generated)",
        "octopus (106 prompt tokens, 8 generated)",
        "A red circle to the left of a blue square.",
    ]


def test_another_model_may_be_named(play):
    with pytest.raises(FileNotFoundError, match="/no/such/model"):
        play("single_picture.py", "/no/such/model")


@pytest.mark.slow
def test_several_pictures(play):
    # Nano has learned one question at a time, so what it says to two of them is left open.
    assert all(play("several_pictures.py").splitlines())


@pytest.mark.slow
def test_a_document(play):
    lines = play("document.py").splitlines()
    tokens = [int(found) for found in re.findall(r"\(tokens: (\d+)\)", "\n".join(lines))]
    assert lines[1] == "Welcome"
    assert lines[3] == "Budget"
    assert tokens[0] == tokens[1]
    assert tokens[2] > 10 * tokens[0]


@pytest.mark.slow
def test_a_clip(play):
    lines = play("video.py").splitlines()
    frames = [int(found) for found in re.findall(r"\(frames: (\d+), tokens: \d+\)", "\n".join(lines))]
    assert frames == [1, 8, 8]  # four seconds, two frames a second


@pytest.mark.slow
def test_a_chart(play):
    *_, table = play("chart.py").splitlines()
    assert re.fullmatch(r"\[.*\] total: -?\d+", table)


@pytest.mark.slow
def test_json(play):
    said = json.loads(play("json_extraction.py"))
    assert list(said) == ["shop", "date", "items", "paid"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", said["date"])


def test_scripts_are_short_and_have_a_page():
    index = (COOKBOOK / "README.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) >= 6
    for script in SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 40, script.name
        assert f"]({script.name})" in index
        assert sum(f"Script: [`{script.name}`]" in page.read_text(encoding="utf-8") for page in PAGES) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_its_script_and_its_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    script = re.search(r"^Script: \[`(.+)`\]", text, re.MULTILINE)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert bool(blocks) == bool(script)
    for block in blocks:
        assert block in (page.parent / script[1]).read_text(encoding="utf-8")


def test_options_in_the_pages_exist():
    commands = typer.main.get_command(cli.app).commands
    lines = (COOKBOOK / "many-files.md").read_text(encoding="utf-8").splitlines()
    known = {name: {option for one in command.params for option in one.opts} for name, command in commands.items()}
    uses = [line for line in lines if line.startswith("aria ")]
    assert len(uses) >= 3
    for line in uses:
        assert set(re.findall(r"--[a-z-]+", line)) <= known[line.split()[1]], line


def test_the_batch_in_the_pages_is_one(tmp_path):
    text = (COOKBOOK / "many-files.md").read_text(encoding="utf-8")
    request, response = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "in.jsonl").write_text(request)
    [line] = find_lines(tmp_path / "in.jsonl")
    batch = BatchFile(tmp_path / "in.jsonl", ServerSettings(model_names=("Aria",)))
    assert batch.recognize(json.loads(response)) == (line.custom_id, False)


def test_media_can_be_drawn_again(tmp_path):
    drawn = runpy.run_path(str(COOKBOOK / "media" / "draw.py"))
    drawn["clip"](tmp_path / "clip.mp4")
    for file in (tmp_path / "clip.mp4", COOKBOOK / "media" / "clip.mp4"):
        with av.open(str(file)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 48
    assert drawn["chart"]().size == (960, 720)
    assert drawn["receipt"]().size == (560, 560)
