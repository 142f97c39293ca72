"""From an export in shards and its results to the package: one file of weights, and the card's table in its place."""

import json
from pathlib import Path

import pytest
import torch

from aria.checkpoint import load_model, save_checkpoint
from aria.model import Aria
from recipes.nano import publish
from recipes.nano.model import tiny_config
from recipes.nano.tokenizer import NANO_FOLDER

RESULTS = {row.task: {"items": 1000 + n, "exact": n / 16} for n, row in enumerate(publish.ROWS)}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An export in shards, the results, and a package that holds a card and another model."""
    torch.manual_seed(0)
    export, results, package = tmp_path / "export", tmp_path / "results.json", tmp_path / "package"
    config = tiny_config(400)
    state = {name: torch.randn_like(value).bfloat16() for name, value in Aria(config).state_dict().items()}
    save_checkpoint(state, config, export, max_shard_size="300KB")
    assert len(list(export.glob("*.safetensors"))) > 1
    results.write_text(json.dumps(RESULTS))
    package.mkdir()
    (package / "model.safetensors").write_bytes(b"of before")
    (package / "tokenizer.model").write_bytes(b"stays")
    (package / "README.md").write_text(f"# Card\n\n{publish.BEGIN}\nold\n{publish.END}\n\nGrüße\n", encoding="utf-8")
    return export, results, package


def test_the_package_gets_one_file_and_the_table_and_keeps_the_rest(trained: tuple[Path, Path, Path]) -> None:
    export, results, package = trained
    publish.main([str(export), str(results), "--package", str(package)])
    assert [file.name for file in package.glob("*.safetensors*")] == ["model.safetensors"]
    assert (package / "tokenizer.model").read_bytes() == b"stays"
    wanted, found = load_model(export).state_dict(), load_model(package).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    card = (package / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# Card\n") and card.endswith("\n\nGrüße\n") and "old" not in card
    assert "| one word, held-out faces | 1,001 | 6.2 % | >= 78 % |" in card.splitlines()


@pytest.mark.parametrize("broken", ["card", "results", "size"])
def test_nothing_is_written_where_something_is_wrong(
    trained: tuple[Path, Path, Path], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, results, package = trained
    if broken == "card":
        (package / "README.md").write_text(f"{publish.END} {publish.BEGIN}")
    elif broken == "results":
        results.write_text(json.dumps({task: row for task, row in RESULTS.items() if task != "colour"}))
    else:
        monkeypatch.setattr(publish, "MOST_BYTES", 1000)
    before = {file.name: file.read_bytes() for file in package.iterdir()}
    message = {"card": "once each, in this order", "results": "in these tasks: colour", "size": "room for 40 MiB"}
    with pytest.raises(ValueError, match=message[broken]):
        publish.publish(export, results, package)
    assert before == {file.name: file.read_bytes() for file in package.iterdir()}


def test_the_packaged_card_has_the_table_that_publishing_writes() -> None:
    card = (NANO_FOLDER / "README.md").read_text(encoding="utf-8")
    rows = card.split(publish.BEGIN)[1].split(publish.END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert [(title, goal) for title, _, _, goal in cells] == [(row.title, row.goal) for row in publish.ROWS]
    assert publish.with_table(card, "\n".join(rows)) == card
