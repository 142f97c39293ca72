"""``aria data check``: every problem in a data set is reported by file and line, and the size of the rest."""

from __future__ import annotations

import json
import os
import re

import pytest

from aria.cli import options
from aria.train.data import DataSettings, DataStream
from aria.train.data.check import check_data
from aria.train.data.encode import RowEncoder
from aria.train.data.look import judge, look
from aria.train.data.sources import Sources
from tests.helpers import made_data, made_media
from tests.helpers.made_data import chat, config, jsonl, processor, said


def shown(*parts: dict, **more) -> dict:
    return {"messages": [said("user", list(parts)), said("assistant", "dog")], **more}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A data set with a good row and one row of every fault; ``kinds`` tells by line what is wrong."""
    folder = tmp_path_factory.mktemp("bad")
    made_data.picture(folder, "good.png")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "short.mp4").write_bytes(made_media.clip(40)[:700])
    (folder / "text.png").write_text("not a picture")
    whole = (folder / made_data.picture(folder, "whole.png", (300, 300))).read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.png").mkdir()
    image = {"type": "image", "text": None}
    rows: list[tuple[object, str | None]] = [
        (shown(image, images=["good.png"]), None),
        ('{"messages": [', "not JSON"),
        (shown(image, images=["none.png"]), "missing medium"),
        ("", None),
        (shown({"type": "video", "text": None}, video={"path": "empty.mp4", "num_frames": 4}), "bad medium"),
        (shown({"type": "video", "text": None}, video={"path": "short.mp4", "num_frames": 4}), "bad medium"),
        (shown(image, image, images=["good.png"]), "media count"),
        (chat("a", ""), "empty answer"),
        (chat("3" * 100_000, "dog"), "too long"),
        (b'{"text": "\xc3\x28"}', "not UTF-8"),
        ({"messages": [said("narrator", "a"), said("assistant", "b")]}, "unknown role"),
        ({"messages": [said("user", "a")]}, "no answer"),
        (shown(image, images=["half.png"]), "bad medium"),
        (shown(image, images=["text.png"]), "bad medium"),
        (shown(image, images=["folder.png"]), "bad medium"),
        (shown({"type": "image", "url": "http://127.0.0.1:9/a.png"}), "bad medium"),
        (chat("a", "\ud800"), "bad message"),
        (shown({"type": "image", "path": "good.png", "max_image_size": 500}), "bad medium"),
        (shown({"type": "video", "path": "empty.mp4", "num_frames": 0}), "bad message"),
        (chat("#", "dog"), None),
    ]  # fmt: skip
    file = jsonl(folder / "train.jsonl", [row for row, _ in rows])
    return file, {line: kind for line, (_, kind) in enumerate(rows, 1) if kind}


def check(*names, tokens=512, **settings):
    made = DataSettings(paths=tuple(map(str, names)), workers=2, **settings)
    return check_data(made, processor(), config(), tokens=tokens)


def test_every_problem_is_reported_by_file_and_line(bad):
    file, kinds = bad
    calls = []
    made = DataSettings(paths=(str(file.parent),), workers=3)
    found = check_data(made, processor(), config(), tokens=512, progress=lambda *counts: calls.append(counts))
    reported = {}
    for kind, rows in found.problems.items():
        for row in rows:
            place, _, why = row.removeprefix(f"{file}:").partition(": ")
            reported[int(place)] = kind
            assert why
            assert len(row) < 500
    assert reported == kinds
    assert found.usable == 2
    assert calls == [(i + 1, 19) for i in range(19)], "the blank line is no row"


@pytest.mark.parametrize("name", ["none.png", "empty.mp4", "half.png", "text.png"])
def test_media_are_reported_by_name(bad, name):
    file, _ = bad
    found = check(file)
    assert any(name in row for rows in found.problems.values() for row in rows)


def test_a_stream_skips_what_the_check_finds(bad):
    file, kinds = bad
    stream = DataStream(DataSettings(paths=(str(file),), lookahead=1), processor(), config(), tokens=512)
    next(iter(stream))
    assert set(stream.report.skipped) <= set(kinds.values())
    assert stream.report.labels


def test_text_that_is_not_a_string_is_an_unusable_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "half a pair: \\ud800"}\n{"text": "a fox"}\n', encoding="utf-8")
    found = check(file)
    assert list(found.problems) == ["bad text"] and found.usable == 1
    assert found.problems["bad text"][0].startswith(f"{file}:1: ")


def test_a_file_truncated_during_a_check_is_an_error_that_names_the_line(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [chat("what?", "dog")] * 5)
    settings = DataSettings(paths=(str(file),), workers=0)

    def cut(done: int, _: int) -> None:
        if done == 2:
            os.truncate(file, 100)

    with pytest.raises(ValueError, match=r"a\.jsonl:3: the file was changed .* missing or incomplete"):
        check_data(settings, processor(), config(), tokens=512, progress=cut)


def looked(*names, world=1, on_error="skip") -> str:
    settings = DataSettings(paths=tuple(map(str, names)), workers=2)
    sources = Sources(settings.weights)
    encoder = RowEncoder(processor(), config(), settings, 512)
    looks = [look(sources, encoder, settings, rank=rank, world=world) for rank in range(world)]
    return judge(looks, "training rows", on_error)


@pytest.mark.parametrize("world", [1, 3])
def test_a_look_names_all_unusable_rows(bad, world):
    file, kinds = bad
    said = looked(file, world=world)
    assert said.startswith("17 of 19 training rows that were checked cannot be used and will be skipped:\n")
    reported = {
        int(line): kind for line, kind in re.findall(rf"^  {re.escape(str(file))}:(\d+): ([^:]+): ", said, re.M)
    }
    assert reported == kinds
    with pytest.raises(ValueError, match=r"(?s)and \[data\] on_error is stop:.*:2: not JSON.*:17: bad message"):
        looked(file, world=world, on_error="stop")


def test_a_look_takes_the_first_rows_and_some_of_all_others(tmp_path):
    rows = ["no row" if i in (3, 49, 999) else chat("what?", "dog") for i in range(1000)]
    file = jsonl(tmp_path / "a.jsonl", rows)
    assert looked(file).startswith("3 of 100 training rows")
    assert f"{file}:4, 50, 1000: not JSON: " in looked(file)
    many = [jsonl(tmp_path / f"{i}.jsonl", ["no row", *[chat("what?", "dog")] * 20]) for i in range(12)]
    assert looked(*many).startswith("12 of 120 training rows")
    assert looked(*[jsonl(tmp_path / "b.jsonl", [chat("what?", "dog")])]) == ""


def test_a_data_set_without_usable_rows_is_refused(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", [chat("what?", "dog")] * 5)
    other = jsonl(tmp_path / "other.jsonl", [{"instruction": "what?", "output": "dog"}] * 7)
    name = re.escape(str(other))
    message = (
        rf"7 of 12 .* cannot be used, and none of {name}:\n  {name}:1, 2, 3, 4, 5, 6, 7: other format: .* Alpaca's"
    )
    with pytest.raises(ValueError, match=message):
        looked(good, other)


def test_what_is_longer_than_the_models_context_is_too_long(tmp_path):
    most = config().text.max_position_embeddings
    file = jsonl(tmp_path / "a.jsonl", [chat("3 " * most, "dog"), chat("3", "dog")])
    assert list(check(file, tokens=4 * most).problems) == ["too long"]


def located(messages: list[dict], folder) -> list[dict]:
    """Messages whose paths hold wherever they are read."""
    question, answer = messages
    parts = [{**part, "path": folder / part["path"]} if "path" in part else part for part in question["content"]]
    return [{**question, "content": parts}, answer]


def test_sizes_and_cost(tmp_path):
    made_data.picture(tmp_path, "a.png")
    image = {"type": "image", "path": "a.png"}
    rows = [shown(*[image] * (i % 3), {"type": "text", "text": "3" * i}) for i in range(40)]
    found = check(jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", [{"text": "fox " * 300}]), tokens=128)
    assert list(found.rows.values()) == [40, 1]
    # Counted once more, by the processor.
    alone = [processor().prepare(located(row["messages"], tmp_path), add_generation_prompt=False) for row in rows]
    joint = check(tmp_path / "a.jsonl", tokens=128, labels="joint")
    assert [size.tokens for size in joint.sizes] == [len(one.ids) for one in alone]
    assert [size.images for size in joint.sizes] == [len(one.images) for one in alone]
    assert found.notes["text cut"].count == 1
    assert found.tokens == sum(size.tokens for size in found.sizes) <= found.batches * 128
    assert found.efficiency > 0.8
    spread = found.distribution()
    assert spread["crops"] == {"mean": pytest.approx(39 / len(found.sizes)), "p0": 0, "p50": spread["crops"]["p50"],
                               "p90": 2, "p99": 2, "p100": 2}  # fmt: skip
    bins = found.histogram()
    assert sum(count for _, count in bins) == len(found.sizes)
    assert bins[-1][0] == 128
    for bound, count in bins:
        assert count == sum(bound // 2 < size.tokens <= bound for size in found.sizes)


def test_batches_of_a_check_are_those_of_an_epoch(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [chat("3" * (i * 13 % 60), "dog") for i in range(200)])
    found = check(file, tokens=128)
    stream = DataStream(DataSettings(paths=(str(file),)), processor(), config(), tokens=128)
    batches = iter(stream)
    count = 0
    while stream.epochs < 1:
        next(batches)
        count += 1
    assert abs(count - found.batches) <= 0.05 * count


def test_the_command_reports_problems_and_fails(command, bad, model_folder, capsys, monkeypatch):
    monkeypatch.setattr(options.out, "width", 400)  # paths in tables are not broken
    file, _ = bad
    assert command("data", "check", file, "--model", model_folder, "--tokens", 2048) == 1
    said = capsys.readouterr().out
    for word in ("not JSON", "missing medium", f"train.jsonl:{2}", "an epoch: 2 sequences", "1 batches of 2,048"):
        assert word in " ".join(said.split())


def test_the_command_writes_json(command, tmp_path, model_folder, capsys):
    file = jsonl(tmp_path / "a.jsonl", [chat("what?", "dog")] * 3)
    assert command("data", "check", file, "--model", model_folder, "--json", "--tokens", 64) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {str(file): 3}
    assert found["usable"] == found["sequences"] == 3
    assert found["problems"] == {}
    assert found["tokens"] == 3 * found["distribution"]["tokens"]["mean"]
    assert found["batches"] * found["batch_tokens"] * found["efficiency"] == pytest.approx(found["tokens"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.jsonl"], "no data set at"),
        (["hf:"], "names no data set"),
        (["--labels", "both"], "labels"),
        (["--max-image-size", "11"], "sizes are"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(command, tmp_path, model_folder, capsys, arguments, said):
    file = jsonl(tmp_path / "a.jsonl", [chat("what?", "dog")])
    assert command("data", "check", file, *arguments, "--model", model_folder) == 2
    assert said in capsys.readouterr().err
