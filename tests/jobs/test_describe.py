"""``aria describe``: folders of media -> JSON Lines, each file once, despite interruptions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from aria import SamplingParams
from aria.hub import NANO
from aria.jobs import Describer, MediaItem, find_media

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
MEDIA = Path(__file__).parents[2] / "docs" / "cookbook" / "media"
ANSWERS = {
    "word.png": 'The word "Welcome".',
    "shapes.png": "A red circle to the left of a blue square.",
    "emoji.png": "An octopus emoji.",
}
"""What nano says of the sample pictures."""


@pytest.fixture
def run(capfdbinary, command):
    """Run ``aria`` with arguments; returns exit code, records on the output, and errors."""

    def call(*arguments: object):
        code = command(*arguments)
        captured = capfdbinary.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err.decode()

    return call


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them in a subfolder, and other or hidden files."""
    root = tmp_path / "album"
    (root / "trip" / ".cache").mkdir(parents=True)
    shutil.copy(PICTURES / "shapes.png", root / "shapes.PNG")
    shutil.copy(PICTURES / "word.png", root)
    shutil.copy(PICTURES / "emoji.png", root / "trip")
    shutil.copy(PICTURES / "emoji.png", root / "trip" / ".cache")
    shutil.copy(PICTURES / "emoji.png", root / ".hidden.png")
    (root / "notes.txt").write_text("no medium")
    return root


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_media_are_found_in_order(folder):
    (folder / "b").mkdir()
    (folder / "b" / "clip.MP4").touch()
    (folder / "b" / "paper.pdf").touch()
    media, others = find_media([folder, folder / "word.png", folder / ".hidden.png"])
    names = [(Path(medium.path).relative_to(folder).as_posix(), medium.kind) for medium in media]
    assert names == [
        ("shapes.PNG", "image"),
        ("word.png", "image"),
        ("b/clip.MP4", "video"),
        ("b/paper.pdf", "document"),
        ("trip/emoji.png", "image"),
        (".hidden.png", "image"),  # named explicitly
    ]
    assert others == 1
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_media([folder, folder / "nowhere"])


@pytest.mark.slow
def test_every_file_is_described(run, folder):
    code, reported, err = run("describe", folder)
    assert code == 0
    assert {Path(record["path"]).name.lower(): record["text"] for record in reported} == ANSWERS
    for record in reported:
        assert list(record) == [
            *("path", "kind", "prompt", "text", "finish_reason", "usage", "model", "seconds", "error"),
            *("base", "adapter", "settings", "content"),
        ]
        assert (record["kind"], record["model"], record["error"]) == ("image", "aria-nano", None)
        assert record["finish_reason"] == "stop"
        assert record["usage"]["media"] == {"count": 1, "crops": 1, "tokens": 128}
        assert record["usage"]["prompt_tokens"] > 64 < record["usage"]["total_tokens"]
        assert record["seconds"] > 0
    assert err == "3 done, 1 skipped\n"


@pytest.mark.slow
def test_videos_and_documents_are_described(run):
    code, reported, err = run("describe", MEDIA, "--num-frames", 4, "--pages", "2-3", "--no-split", "--max-tokens", 4)
    assert (code, err) == (0, "4 done, 1 skipped\n")
    by_name = {Path(record["path"]).name: record for record in reported}
    assert {name: record["kind"] for name, record in by_name.items()} == {
        "chart.png": "image", "clip.mp4": "video", "pages.pdf": "document", "receipt.png": "image",
    }  # fmt: skip
    assert by_name["clip.mp4"]["usage"]["media"] == {"count": 4, "crops": 4, "tokens": 256}
    assert by_name["clip.mp4"]["prompt"] == "Describe what happens in this clip."
    assert by_name["pages.pdf"]["usage"]["media"] == {"count": 2, "crops": 2, "tokens": 256}


@pytest.mark.slow
def test_answers_follow_a_schema(run, tmp_path):
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({**schema, "additionalProperties": False}))
    code, [record], _ = run("describe", PICTURES / "shapes.png", "--schema", file)
    assert code == 0
    assert json.loads(record["text"])["colour"] in ("red", "blue")
    # Errors in the schema are not the file's fault: they are reported once, and nothing is written.
    file.write_text(json.dumps({**schema, "not": {"required": ["size"]}}))
    out = tmp_path / "out.jsonl"
    code, reported, err = run("describe", PICTURES / "shapes.png", "--schema", file, "-o", out)
    assert (code, reported, out.read_bytes()) == (2, [], b"")
    assert "json_schema cannot be followed" in err


@pytest.mark.slow
def test_a_broken_file_is_one_line_and_exit_code_1(run, folder, tmp_path):
    complete = (folder / "word.png").read_bytes()
    (folder / "torn.png").write_bytes(complete[: len(complete) // 2])
    (folder / "empty.jpg").touch()
    out = tmp_path / "out.jsonl"
    code, printed, err = run("describe", folder, "--out", out, "--prompt", "What is this?")
    assert (code, printed) == (1, [])
    by_name = {Path(record["path"]).name: record for record in records(out)}
    assert len(by_name) == 5
    assert "torn.png" in by_name["torn.png"]["error"] and by_name["torn.png"]["text"] is None
    assert "empty.jpg" in by_name["empty.jpg"]["error"]
    assert by_name["word.png"]["text"] == ANSWERS["word.png"]
    assert err == "3 done, 2 failed, 1 skipped\n"


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(run, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run("describe", folder, "-o", out)[0] == 0
    complete = records(out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1][:-30])
    code, _, err = run("describe", folder, "-o", out)
    assert (code, err) == (0, "2 done, 1 done before, 1 skipped\n")
    assert out.read_bytes().startswith(lines[0])
    again = records(out)
    assert len(again) == 3
    assert {r["path"]: r["text"] for r in again} == {r["path"]: r["text"] for r in complete}
    # Nothing is left to do, so no model is loaded.
    code, _, err = run("describe", folder, "-o", out, "--device", "cuda:99")
    assert (code, err) == (0, "0 done, 3 done before, 1 skipped\n")


@pytest.mark.slow
def test_outputs_of_other_prompts_or_models_are_not_resumed(run, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run("describe", folder, "-o", out)
    before = out.read_bytes()
    code, _, err = run("describe", folder, "-o", out, "--prompt", "What colour is it?")
    assert code == 2 and "with the prompt 'Describe this picture.', but now it is 'What colour is it?'" in err
    code, _, err = run("describe", folder, "-o", out, "--model", "someone/other")
    assert code == 2 and "with the model 'aria-nano', but now it is 'other'" in err
    shutil.copytree(NANO, tmp_path / "aria-nano")
    code, _, err = run("describe", folder, "-o", out, "--model", tmp_path / "aria-nano")
    assert code == 2 and f"with the base 'aria-nano', but now it is '{tmp_path / 'aria-nano'}'" in err
    assert out.read_bytes() == before
    code, _, err = run("describe", folder, "-o", folder / "notes.txt")
    assert code == 2 and "notes.txt is not a JSON object" in err
    assert (folder / "notes.txt").read_text() == "no medium"


@pytest.mark.slow
def test_changed_media_or_settings_are_refused_by_name(run, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run("describe", folder, "-o", out, "--max-tokens", 3)[0] == 0
    before = out.read_bytes()
    assert [record["settings"]["max_tokens"] for record in records(out)] == [3, 3, 3]
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    for changed in (("--max-tokens", 4), ("--max-image-size", 224), ("--schema", schema), ("--seed", 0)):
        code, _, err = run("describe", folder, "-o", out, "--max-tokens", 3, *changed)
        assert code == 2 and "with the settings {" in err and changed[0][2:].replace("-", "_")[:9] in err
    # A copied file has another time but the same content.
    (folder / "word.png").touch()
    assert run("describe", folder, "-o", out, "--max-tokens", 3)[0] == 0
    shutil.copyfile(folder / "trip" / "emoji.png", folder / "word.png")
    code, _, err = run("describe", folder, "-o", out, "--max-tokens", 3)
    reported = "".join(err.split())  # long paths are wrapped
    assert code == 2 and "thecontentof" in reported and "word.png'.Nameanotheroutput" in reported
    assert out.read_bytes() == before
    # Records of earlier versions have neither.
    old = [{key: value for key, value in one.items() if key not in ("content", "settings")} for one in records(out)]
    out.write_text("".join(json.dumps(one) + "\n" for one in old))
    assert run("describe", folder, "-o", out)[0] == 0


@pytest.mark.slow
def test_sampling_and_image_options_are_used(run, tmp_path):
    picture = tmp_path / "wide.png"
    Image.new("RGB", (900, 300), "white").save(picture)
    usage = {}
    for name, options in {"plain": (), "small": ("--max-image-size", 224), "split": ("--split",)}.items():
        code, [record], _ = run("describe", picture, "--max-tokens", 2, *options)
        assert (code, record["finish_reason"], record["usage"]["completion_tokens"]) == (0, "length", 2)
        usage[name] = record["usage"]["prompt_tokens"]
    assert usage["plain"] - usage["small"] == 64
    assert usage["split"] > usage["plain"]
    code, _, err = run("describe", picture, "--temperature", 3)
    assert code == 2 and "temperature is 3.0" in err


def test_the_default_prompt_depends_on_the_kind():
    settings = {"max_image_size": 448, "num_frames": 8, "pages": "2-3"}
    describer = Describer("m", SamplingParams(), None, settings)
    parts = {
        kind: describer.messages(MediaItem(f"a.{kind}", kind))[0]["content"] for kind in ("image", "video", "document")
    }
    assert parts["image"][0] == {"type": "image", "path": "a.image", "max_image_size": 448}
    assert parts["video"][0] == {"type": "video", "path": "a.video", "max_image_size": 448, "num_frames": 8}
    assert parts["document"][0] == {"type": "document", "path": "a.document", "max_image_size": 448, "pages": "2-3"}
    assert parts["image"][1]["text"] == "\nDescribe this picture."
    assert parts["document"][1]["text"] == "Summarize this document."
