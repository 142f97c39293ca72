"""Publishing from the stages' folders into the package: weights in one file, the card's table, learning curves."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from aria.checkpoint import load_model, save_checkpoint
from aria.model import Aria
from recipes.nano.eval import curves, publish
from recipes.nano.eval.items import NEEDLES, REFUSALS, TEXTS
from recipes.nano.text.tokenizer import NANO_FOLDER
from recipes.nano.train.model import tiny_config

STAGES = ("1-language", "2-seeing", "3-long", "4-answers")


def results(share: float) -> dict[str, dict[str, float]]:
    rows = {
        row.task: {"items": 1000 + n, "exact": share, "near": 0.5, "letters": 0.75}
        for n, row in enumerate(publish.ROWS)
    }
    return {**rows, "false not sure": {"items": 7, "exact": 0.0}}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Stages (the second not evaluated, the first not logged), earlier results, and a package folder."""
    torch.manual_seed(0)
    runs, before, package = tmp_path / "runs", tmp_path / "before.json", tmp_path / "package"
    config = tiny_config(400)
    state = {name: torch.randn_like(value).bfloat16() for name, value in Aria(config).state_dict().items()}
    for n, name in enumerate(STAGES):
        (runs / name).mkdir(parents=True)
        if n != 1:
            (runs / name / "results.json").write_text(json.dumps(results(n / 8)))
        if n != 0:
            lines = [{"step": 10, "held-out loss": 1.0}]
            lines += [{"step": s, "seconds": 30.0 * s, "answer loss": 1 / s} for s in range(1, 4)]
            (runs / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_checkpoint(state, config, runs / STAGES[-1] / "export", max_shard_size="300KB")
    assert len(list((runs / STAGES[-1] / "export").glob("*.safetensors"))) > 1
    before.write_text(json.dumps({"colour": {"items": 3, "exact": 0.884}}))
    package.mkdir()
    (package / "model.safetensors").write_bytes(b"of before")
    (package / "tokenizer.model").write_bytes(b"stays")
    (package / "README.md").write_text(f"# Card\n\n{publish.BEGIN}\nold\n{publish.END}\n\nGrüße\n", encoding="utf-8")
    return runs, before, package


def test_weights_table_and_curves_are_written_and_other_files_kept(
    trained: tuple[Path, Path, Path],
) -> None:
    runs, before, package = trained
    publish.main([str(runs), "--before", str(before), "--package", str(package)])
    assert [file.name for file in package.glob("*.safetensors*")] == ["model.safetensors"]
    assert (package / "tokenizer.model").read_bytes() == b"stays"
    wanted, found = load_model(runs / STAGES[-1] / "export").state_dict(), load_model(package).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    card = (package / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# Card\n") and card.endswith("\n\nGrüße\n") and "old" not in card
    lines = card.splitlines()
    assert "| task | items | first edition | after 1 language | after 3 long | after 4 answers | goal |" in lines
    assert "| one word, held-out faces | 1,001 | – | 0.0 % | 25.0 % | 37.5 % | >= 85 % |" in lines
    assert any(line.startswith("| colour of a shape |") and "| 88.4 % | 0.0 % |" in line for line in lines)
    assert any("wrong letters | 1,006 | – | 25.0 % | 25.0 % | 25.0 % | <= 10 % |" in line for line in lines)
    assert any(line.startswith("| definition of") and line.count("50.0 %") == 3 for line in lines)
    drawn = package / publish.CURVES
    assert drawn.stat().st_size < 60_000 and Image.open(drawn).width > 600


@pytest.mark.parametrize("broken", ["card", "tasks", "unmeasured", "size"])
def test_nothing_is_written_if_a_check_fails(
    trained: tuple[Path, Path, Path], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, before, package = trained
    last = runs / STAGES[-1] / "results.json"
    if broken == "card":
        (package / "README.md").write_text(f"{publish.END} {publish.BEGIN}")
    elif broken == "tasks":
        last.write_text(json.dumps({task: row for task, row in results(0.5).items() if task != "colour"}))
    elif broken == "unmeasured":
        last.unlink()
    else:
        monkeypatch.setattr(publish, "MOST_BYTES", 1000)
    held = {file.name: file.read_bytes() for file in package.iterdir()}
    message = {
        "card": "once each, in this order",
        "tasks": "in these tasks: colour",
        "unmeasured": "no results.json",
        "size": "room for 40 MiB",
    }
    with pytest.raises(ValueError, match=message[broken]):
        publish.publish(runs, package, before)
    assert held == {file.name: file.read_bytes() for file in package.iterdir()}


def test_curves_continue_where_the_previous_stage_ended(trained: tuple[Path, Path, Path]) -> None:
    logs = {name: curves.read(trained[0] / name / "log.jsonl") for name in STAGES}
    assert not logs["1-language"] and len(logs["2-seeing"]) == 3
    minutes, values = curves.joined(logs, "answer loss")
    assert minutes == pytest.approx([0.5 * n for n in range(1, 10)])
    assert values == pytest.approx([1.0, 1 / 2, 1 / 3] * 3)
    assert curves.joined(logs, "patch accuracy") == ([], [])


def test_every_task_of_the_evaluation_has_a_row() -> None:
    tasks = {row.task for row in publish.ROWS}
    assert {*NEEDLES, *REFUSALS, *TEXTS, "definitions", "talk", "false not sure"} <= tasks


def test_packaged_card_has_the_published_table() -> None:
    card = (NANO_FOLDER / "README.md").read_text(encoding="utf-8")
    rows = card.split(publish.BEGIN)[1].split(publish.END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert [(title, goal) for title, *_, goal in cells] == [(row.title, row.goal) for row in publish.ROWS]
    assert publish.with_table(card, "\n".join(rows)) == card
