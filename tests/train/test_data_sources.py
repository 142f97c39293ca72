"""Data sets: files that change while they are read, copies that are the same data, and tables by content."""

from __future__ import annotations

import itertools
import json
import os
import re

import pytest

from aria.train.data import sources
from aria.train.data.content import WINDOW, content_hash
from aria.train.data.report import RowError
from aria.train.data.sources import open_source
from tests.helpers.made_data import chat, jsonl, plain, stream, take

REWRITTEN = {
    "shorter": (lambda old: old[:40], r"had 1,\d\d\d bytes and now has 40, so this line is missing or incomplete"),
    "empty": (lambda old: b"", r"now has 0"),
    "changed": (lambda old: old.replace(b"dogs", b"cats"), "this line has changed. Restore"),
    "longer": (lambda old: old.replace(b"dogs", b"doggies"), r"this line has changed, and the file had"),
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_a_file_rewritten_while_it_is_read_is_an_error_that_names_the_line(tmp_path, how):
    file = jsonl(tmp_path / "train.jsonl", [chat(f"{i}", "dogs") for i in range(20)])
    before, (change, said) = file.read_bytes(), REWRITTEN[how]
    one = stream(file, on_error="skip", workers=0)
    batches = iter(one)
    next(batches)
    state = one.state_dict()
    with file.open("r+b") as opened:  # in place, as shells and scripts do
        opened.write(change(before))
        opened.truncate()
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}:\d+: the file was changed .*{said}"):
        for _ in range(60):
            next(batches)
    one.load_state_dict(state)
    file.write_bytes(before)
    assert len(take(one, 3)) == 3


def test_a_file_that_grows_or_is_replaced_is_read_to_its_end(tmp_path):
    file = jsonl(tmp_path / "train.jsonl", [chat("a", "dogs")] * 20)
    expected = [plain(batch) for batch in take(stream(file), 12)]
    batches = iter(stream(file, workers=0))
    found = [plain(next(batches)) for _ in range(3)]
    with file.open("ab") as opened:
        opened.write(b"more\n")
    found += [plain(next(batches)) for _ in range(3)]
    jsonl(tmp_path / "new", [chat("a", "cats")]).replace(file)
    assert found + [plain(next(batches)) for _ in range(6)] == expected


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes 20 rows as Parquet, each time into a cache of its own, and gives the file."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    caches = itertools.count()

    def write(answer="dogs", **options):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / f"cache{next(caches)}"))
        rows = [{**chat(f"{i}", answer if i == 7 else "dogs"), "images": None if i % 2 else []} for i in range(20)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet", **options)
        return tmp_path / "train.parquet"

    return write


@pytest.mark.parametrize("how", ["copied", "other row groups"])
def test_a_copy_of_a_table_is_the_same_data(table, how):
    one = stream(table())
    take(one, 2)
    state = json.loads(json.dumps(one.state_dict()))
    file = table(**({"batch_size": 3} if how == "other row groups" else {}))
    os.utime(file, (0, 0))
    again = stream(file)
    again.load_state_dict(state)
    assert [plain(batch) for batch in take(again, 2)] == [plain(batch) for batch in take(stream(file), 4)[2:]]
    other = stream(table("cats"))
    with pytest.raises(ValueError, match="data have changed"):
        other.load_state_dict(state)


def test_states_of_earlier_versions_load_if_the_table_is_unchanged(table):
    file = table()
    one = stream(file)
    take(one, 2)
    [source] = one._sources._all
    state = one.state_dict() | {"sources": [f"{file}, 20 rows, {source._rows._fingerprint}"]}
    stream(file).load_state_dict(state)
    with pytest.raises(ValueError, match="data have changed"):
        stream(table("cats")).load_state_dict(state)


def test_a_saved_folder_may_be_rewritten_while_it_is_read(table, tmp_path):
    import datasets

    datasets.Dataset.from_parquet(str(table())).save_to_disk(str(tmp_path / "saved"))
    source = open_source(str(tmp_path / "saved"))
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"")
    assert [source.read(i).fields["messages"][1]["content"] for i in range(len(source))] == ["dogs"] * 20


def test_large_tables_are_identified_by_a_sample_of_their_rows(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"{i}"} for i in range(4 * WINDOW)]
    whole = datasets.Dataset.from_list(rows)
    assert content_hash(whole, 600).startswith("sampled ")
    assert content_hash(whole, 600) == content_hash(datasets.concatenate_datasets([whole.take(9), whole.skip(9)]), 600)
    other = datasets.Dataset.from_list([{"text": f"{i + 1}"} for i in range(4 * WINDOW)])
    assert content_hash(whole, 600) != content_hash(other, 600)
    # Every value counts that is not null, whatever lies under those that are.
    nested = [
        {"a": [{"b": [1.5, None], "c": None}], "d": None if i % 2 else [], "e": b"x", "f": True} for i in range(9)
    ]
    changed = [{"b": [1.5, 0.0], "c": None}], [{"b": [1.5, None], "c": ""}], [{"b": [1.5], "c": None}], None, []
    hashes = {content_hash(datasets.Dataset.from_list(nested))}
    for value in changed:
        schema = datasets.Dataset.from_list([*nested, {"a": [{"b": [1.5], "c": "x"}]}]).features
        hashes.add(content_hash(datasets.Dataset.from_list([*nested[1:], nested[0] | {"a": value}], features=schema)))
    assert len(hashes) == 1 + len(changed)


def test_an_endless_line_is_one_unusable_row(tmp_path, monkeypatch):
    """It is neither held nor does it hide the others; the fingerprint of its file stays."""
    rows = [chat("a", "dogs"), chat("b", "x" * 3_000_000), chat("c", "cats")]
    file = jsonl(tmp_path / "train.jsonl", rows)
    with file.open("ab") as opened:
        opened.write(b" " * 2_500_000 + b"\n" + json.dumps(chat("d", "y" * 1_500_000)).encode())
    known = open_source(str(file)).fingerprint
    monkeypatch.setattr(sources, "MOST_LINE", 100_000)
    monkeypatch.setattr(sources, "_PIECE", 70_000)
    found = open_source(str(file))
    assert found.fingerprint == known and [found.where(i).rpartition(":")[2] for i in range(4)] == ["1", "2", "3", "5"]
    assert [found.read(i).fields for i in (0, 2)] == [rows[0], rows[2]]
    for index in (1, 3):
        with pytest.raises(RowError, match=r"it has [13],.* bytes; at most 100,000 are read"):
            found.read(index)


def test_an_endless_first_line_is_not_another_format(tmp_path, monkeypatch):
    file = jsonl(tmp_path / "train.jsonl", [chat("a", "x" * 5000), chat("b", "cats")])
    monkeypatch.setattr(sources, "MOST_LINE", 1000)
    assert len(open_source(str(file))) == 2


def test_rows_of_many_small_values_are_refused(tmp_path):
    """In memory they are thirty times as large."""
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(chat("a", "dogs")) + '\n{"messages": [' + "[]," * 2_100_000 + "[]]}\n")
    with pytest.raises(RowError, match="more than 4,000,000 commas, colons and brackets"):
        open_source(str(file)).read(1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../other.arrow"}], "_fingerprint": "a"}, "files outside its folder: '../other"),
        (
            {"_data_files": [{"filename": "/etc/passwd"}], "_fingerprint": "a"},
            "files outside its folder: '/etc/passwd'",
        ),
        ({"_data_files": 3}, "names no files of a data set"),
        ({}, "names no files of a data set"),
    ],
)
def test_a_saved_folder_names_files_of_its_own(tmp_path, state, message):
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path))
