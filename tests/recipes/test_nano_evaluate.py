"""Nano's evaluation: reproducible items from held-out material, laid out as a user would send them."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.nano.assets.archive import pack_files, pack_json
from recipes.nano.eval import evaluate, items
from recipes.nano.eval.evaluate import Answered
from recipes.nano.eval.items import Held, Questions
from recipes.nano.scenes import charts
from recipes.nano.scenes.scene import IMAGE
from recipes.nano.text import dialogue, glosses, text_questions, tokenizer
from recipes.nano.text.tokenizer import NANO_FOLDER
from tests.helpers.nano_material import font, jpeg, material

WORDS = ["apple", "bread", "cloud", "door", "evening", "flower", "goose", "hat", "ice", "jar"]


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small evaluation file: one face (as seen and unseen) and three sprites."""
    path = tmp_path_factory.mktemp("nano") / "eval.npz"
    face = zlib.compress(font(20).font_bytes)
    sprites = material().sprites
    styles = ("noto", "fluent", "openmoji")
    meta = {
        "faces": [{"family": f"Face {held_out}", "style": "", "held_out": held_out} for held_out in (False, True)],
        "sprites": [{"style": style, "label": f"{style} thing"} for style in styles],
        "words": [*WORDS, "idiot"],
    }
    arrays = {"meta": pack_json(meta)}
    for name, files in (("font", [face, face]), ("sprite", sprites), ("photo", [jpeg(0), jpeg(1)])):
        arrays[f"{name}s"], arrays[f"{name}_ends"] = pack_files(files)
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.fixture(autouse=True)
def small_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {f"{word}{end}": f"a thing that is called {word}{end}" for word in WORDS for end in ("", "er", "ful")}
    fields = {"definitions": known, "others": [f"{word}ism" for word in WORDS] + [f"{word}ity" for word in WORDS]}
    monkeypatch.setattr(glosses, "read", lambda: type("Glosses", (), fields))
    for cached in (text_questions.words, text_questions.others):
        cached.cache_clear()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def questions(eval_file: Path) -> Questions:
    return Questions(Held(eval_file), 6)


def test_items_are_reproducible_and_have_an_image_at_every_place(questions: Questions, eval_file: Path) -> None:
    again = Questions(Held(eval_file), 6)
    processor = tokenizer.processor_of_nano()
    for task, made in questions.tasks.items():
        item = questions.item(task, made.count - 1)
        assert item == again.item(task, made.count - 1), task
        assert item.answer and item.question.count(IMAGE) == len(item.scenes), task
        images = questions.paint(item)
        prepared = processor.prepare(item.messages(images))
        assert [span.data.size for span in prepared.images] == [scene.size for scene in item.scenes]
        assert len(prepared.ids) + len(item.answer) < 4096, task
        given = processor.decode([i for i in prepared.ids if i != processor.tokenizer.image_token_id])
        shown = item.question.replace(IMAGE, "<fim_prefix><fim_suffix>")
        assert f"<|im_start|>user\n{shown}<|im_end|>" in given, task


def test_items_use_held_out_material(questions: Questions) -> None:
    held = questions.held
    assert "idiot" not in held.words
    for n in range(6):
        for kind, held_out in (("seen", False), ("unseen", True)):
            for task in ("words", "strings", "lines"):
                [scene] = questions.item(
                    f"{task}, {kind} fonts", n % questions.tasks[f"{task}, {kind} fonts"].count
                ).scenes
                assert {line.face for line in scene.lines} == set(held.faces_of(held_out))
        assert questions.item("words, seen fonts", n).answer.lower() in WORDS
        used = [mark for scene in questions.item("several pictures", n).scenes for mark in scene.marks]
        assert "openmoji thing" not in [mark.name for mark in used]
        asked_for = re.sub(r"\D+", " ", questions.item("sums", n).question).split()
        low, high = sorted(map(int, asked_for))
        assert text_questions.held(f"{low} + {high}")
    assert questions.item("emoji, unseen style", 0).answer == "openmoji thing"
    definitions = [questions.item("definitions", n) for n in range(6)]
    assert len({item.answer for item in definitions}) == 6, "every word should occur once"
    forms = [re.escape(form).replace(r"\{\}", "[a-z]+") for form in text_questions.DEFINE[1]]
    assert all(any(re.fullmatch(form, item.question) for form in forms) for item in definitions)


def test_chart_questions_belong_to_their_task(questions: Questions) -> None:
    for n in range(6):
        largest = questions.item("chart, largest bar", n)
        assert largest.question.removeprefix(IMAGE) in charts.LARGEST
        assert largest.answer.rstrip(".") in [line.text for line in largest.scenes[0].lines]
        assert re.fullmatch(r"\d+\.", questions.item("chart, printed value", n).answer)
    assert questions.item("chart, description", 0).answer.startswith("A bar chart")
    assert {questions.item("chart, largest bar", n).scenes[0].size for n in range(2)} == {224, 448}


def test_clip_answers_match_the_direction(questions: Questions) -> None:
    for n in range(6):
        item = questions.item("clip, direction", n)
        before, after = item.scenes[0].marks[-1], item.scenes[-1].marks[-1]
        assert ("right" in item.answer) == (after.x - before.x > 20)
        assert ("down" in item.answer.lower()) == (after.y - before.y > 20)


def test_needle_depths_cover_the_text(questions: Questions) -> None:
    places = []
    for n in range(2):
        item = questions.item("needle, 2,048 tokens", n)
        owner = re.findall(r"(?:of|does) the (\w+ \w+)", item.question.splitlines()[-1])[0]
        sentence = f"the {owner} is {item.answer}"
        places.append(item.question.index(sentence) / len(item.question))
    assert places[0] < 0.1 and places[1] > 0.9


def test_scores_of_exact_and_near_answers_letters_and_refusals() -> None:
    rows = [
        Answered("words", "?", "Hello", "Hallo"),
        Answered("words", "?", "ab\ncd", "ab \ncd"),
        Answered("definitions", "?", "A large animal.", "A larg animal."),
        Answered("not sure", "?", dialogue.NOT_SURE, dialogue.NOT_SURE),
        Answered("beyond", "?", text_questions.UNKNOWN_FACT, "Paris."),
    ]
    results = evaluate.score(rows)
    assert results["words"]["exact"] == 0.5 and results["words"]["near"] == 0.5
    assert results["words"]["letters"] == pytest.approx(0.8)
    assert results["definitions"]["exact"] == 0.0 and results["definitions"]["near"] == 1.0
    assert results["not sure"]["exact"] == results["not sure"]["not sure"] == 1.0
    assert results["beyond"]["exact"] == results["beyond"]["not sure"] == 0.0
    assert results[evaluate.FALSE] == {"items": 3, "exact": 0.0}
    refusals = (dialogue.NOT_SURE, text_questions.UNKNOWN_WORD, text_questions.NO_PICTURE)
    unsure = evaluate.score([row._replace(given=refusal) for row, refusal in zip(rows, refusals, strict=False)])
    assert unsure[evaluate.FALSE]["exact"] == 1.0
    assert evaluate.distance("kitten", "sitting") == 3
    assert "definitions" in evaluate.table(results)


@pytest.mark.slow
def test_weights_are_evaluated_with_the_processor_of_another_folder(
    eval_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = tmp_path / "export"
    export.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(NANO_FOLDER / name, export)
    results, misses = tmp_path / "results.json", tmp_path / "misses.jsonl"
    arguments = ["--eval-file", str(eval_file), "--count", "4", "--processes", "1", "--device", "cpu"]
    written = ["--json", str(results), "--misses", str(misses)]
    evaluate.main([str(export), "--processor", str(NANO_FOLDER), *arguments, "--tasks", "shape", *written])
    found = json.loads(results.read_text())
    assert list(found) == ["shape", "describe shapes", evaluate.FALSE]
    missed = [json.loads(line) for line in misses.read_text().splitlines()]
    for task in ("shape", "describe shapes"):
        assert found[task]["items"] == 4
        assert sum(row["task"] == task for row in missed) == round(4 * (1 - found[task]["exact"]))
    assert found["shape"]["exact"] > 0.5, "nano should know plain shapes"
    assert '"shape":' in capsys.readouterr().out
    with pytest.raises(ValueError, match="MODEL is None"):
        evaluate.main(["--processor", str(NANO_FOLDER), *arguments])
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, "--tasks", "no such task"])


def test_refusals_are_tasks(questions: Questions) -> None:
    assert {*items.REFUSALS, *items.NEEDLES, *items.TEXTS, "talk"} <= questions.tasks.keys()
