"""Streams of batches: exact mixtures, every row once an epoch on whatever ranks, and the same batches after a stop."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import made_data
import numpy as np
import pytest
import torch
from made_data import chat, config, jsonl, processor, said

from aria.train.batch import FILLER_PIECE, Batch, Sample
from aria.train.data import DataSettings, make_stream
from aria.train.data.content import WINDOW, content_hash
from aria.train.data.order import Order, noise, permutation
from aria.train.data.packer import Packer
from aria.train.data.report import Report
from aria.train.data.sources import open_source
from aria.train.loss import IGNORE_INDEX

TOKENS = 160


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """60 numbered rows of all kinds, a few of which are broken."""
    folder = tmp_path_factory.mktemp("rows")
    made_data.picture(folder, "a.png", (60, 40))
    made_data.picture(folder, "b.png", (20, 50))
    made = []
    for i in range(60):
        shown = [{"type": "image", "path": "ab"[i % 2] + ".png"}] * (i % 4)
        words = {"type": "text", "text": f"#{i:03d} " + "fox " * (i * 7 % 23)}
        made.append({"messages": [said("user", [*shown, words]), said("assistant", "dog " * (1 + i % 5))]})
    made[7] = "broken"
    made[11] = {"messages": [said("user", [{"type": "image", "path": "none.png"}]), said("assistant", "dog")]}
    made[13] = chat("#013 " + "3" * 500, "dog")
    made[17] = {"text": "#017 " + "3" * 400}
    return jsonl(folder / "train.jsonl", made)


BROKEN = {7, 11, 13}


def stream(path, *, rank=0, world=1, seed=3, tokens=TOKENS, **settings):
    made = DataSettings(**{"paths": (str(path),), "lookahead": 3, "prefetch": 2, "workers": 2, **settings})
    return make_stream(made, processor(), config(), tokens=tokens, rank=rank, world=world, seed=seed)


def take(stream, count: int) -> list[Batch]:
    batches = iter(stream)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


def numbers(batches: list[Batch]) -> list[int]:
    """Of the rows in batches, in order; rows that are cut count once."""
    found = []
    for batch in batches:
        for ids in batch.input_ids.split(list(batch.lengths)):
            found += re.findall(r"#(\d\d\d)", processor().decode(ids))
    return [int(number) for number in found]


def plain(batch: Batch) -> Any:
    crops = [(crops.pixels.tolist(), crops.extents) for crops in batch.crops]
    return batch.input_ids.tolist(), batch.targets.tolist(), batch.lengths, batch.filler, crops, batch.labels


def test_batches_are_full_and_sequences_whole(rows):
    image = processor().tokenizer.image_token_id
    loaded = stream(rows)
    batches = take(loaded, 40)
    for batch in batches:
        assert batch.input_ids.shape == batch.targets.shape == (TOKENS,)
        assert batch.input_ids.dtype == batch.targets.dtype == torch.long
        assert sum(batch.lengths) == TOKENS
        assert batch.labels == (batch.targets != IGNORE_INDEX).sum()
        places = sum(made_data.SIZES[crops.pixels.shape[-1]] * len(crops.extents) for crops in batch.crops)
        assert (batch.input_ids == image).sum() == places
        # No target crosses into another sequence, and filler has none.
        ends = torch.tensor(batch.lengths).cumsum(0) - 1
        assert (batch.targets[ends] == IGNORE_INDEX).all()
        assert (batch.targets[TOKENS - batch.filler :] == IGNORE_INDEX).all()
        for ids in batch.input_ids[: TOKENS - batch.filler].split(list(batch.lengths[: _real(batch)])):
            text = processor().decode(ids)
            assert text.endswith(("<|im_end|>\n", "<|endoftext|>", "3"))
    report = loaded.report
    assert report.batches == 40
    assert report.tokens + report.filler == 40 * TOKENS
    assert report.tokens == sum(TOKENS - batch.filler for batch in batches)
    assert report.labels == sum(batch.labels for batch in batches)
    assert report.crops == sum(len(crops.extents) for batch in batches for crops in batch.crops)
    assert 0.8 < report.efficiency < 1


def _real(batch: Batch) -> int:
    """How many of the lengths are not filler."""
    count, left = len(batch.lengths), batch.filler
    while left > 0:
        count -= 1
        left -= batch.lengths[count]
    assert left == 0
    return count


def test_filler_comes_in_short_sequences():
    sample = Sample(torch.tensor([5, 6]), torch.tensor([6, IGNORE_INDEX]))
    batch = Batch.pack([sample], 3 * FILLER_PIECE, 2)
    assert batch.lengths == (2, FILLER_PIECE, FILLER_PIECE, FILLER_PIECE - 2)
    assert batch.filler == 3 * FILLER_PIECE - 2
    assert (batch.input_ids[2:] == 2).all()
    assert batch.labels == 1
    assert Batch.pack([sample], 2, 2).lengths == (2,)
    moved = batch.to("cpu")
    assert plain(moved) == plain(batch)


@pytest.mark.parametrize("world", [1, 3])
def test_every_row_comes_once_an_epoch(rows, world):
    expected = Counter(set(range(60)) - BROKEN)
    seen = Counter()
    for rank in range(world):
        dealt = stream(rows, rank=rank, world=world)
        batches = iter(dealt)
        while dealt.epochs < 3:
            seen.update(numbers([next(batches)]))
        batches.close()
    # At the end each rank has gone a little into the fourth epoch, and a few rows of the third wait.
    for row, count in expected.items():
        assert 3 * count - 1 <= seen[row] <= 3 * count + 1
    assert not BROKEN & set(seen)


def test_epochs_count_what_was_given(rows):
    shown = stream(rows)
    assert (shown.epochs, shown.rows) == (0.0, 60)
    given = 0
    before = 0.0
    for batch in itertools.islice(iter(shown), 30):
        given += len(set(numbers([batch])))
        assert shown.epochs >= before
        before = shown.epochs
    # Rows that are passed over count as done.
    assert given <= shown.epochs * 60 <= given + 3 * (shown.epochs + 1) + 1


@pytest.mark.parametrize("stop", [1, 5, 17])
def test_a_stream_goes_on_exactly_where_it_stopped(rows, stop):
    whole = take(stream(rows, rank=1, world=2), stop + 12)
    first = stream(rows, rank=1, world=2)
    take(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    assert len(json.dumps(state)) < 4000
    # With other numbers of threads, and from a stream that has been somewhere else.
    again = stream(rows, rank=1, world=2, workers=0)
    take(again, 3)
    again.load_state_dict(state)
    assert again.epochs == first.epochs
    assert [plain(batch) for batch in take(again, 12)] == [plain(batch) for batch in whole[stop:]]
    assert again.report.batches == stop + 12


def test_stopping_and_going_on_in_one_stream(rows):
    whole = [plain(batch) for batch in take(stream(rows, workers=4, prefetch=5), 12)]
    one = stream(rows, workers=1, prefetch=1)
    assert [plain(batch) for batch in take(one, 5) + take(one, 7)] == whole


def test_the_seed_decides_the_order(rows):
    orders = {seed: numbers(take(stream(rows, seed=seed), 12)) for seed in (0, 1)}
    assert orders[0] != orders[1]
    assert orders[0] == numbers(take(stream(rows, seed=0, workers=0), 12))
    # In the order of the file, but for what is packed a little later or earlier.
    plain_order = numbers(take(stream(rows, shuffle=False, lookahead=1), 8))
    assert all(abs(place - row) < 12 for place, row in enumerate(sorted(plain_order)))


def test_on_another_number_of_ranks_no_row_is_left_out(rows):
    seen = []
    states = []
    for rank in range(2):
        one = stream(rows, rank=rank, world=2)
        seen += numbers(take(one, 6))
        states.append(one.state_dict())
    for rank in range(3):
        one = stream(rows, rank=rank, world=3)
        one.load_state_dict(states)
        assert 0 < one.epochs < 1
        batches = iter(one)
        while one.epochs < 1.5:
            seen += numbers([next(batches)])
        batches.close()
    assert set(seen) >= set(range(60)) - BROKEN
    assert len(seen) < 60 + 40 + 30
    # One rank's state alone is enough to go on from, and on its own rank the list of all is as good as it.
    states = json.loads(json.dumps(states))
    alone, among = stream(rows, rank=1, world=2), stream(rows, rank=1, world=2)
    alone.load_state_dict(states[1])
    among.load_state_dict(states)
    assert numbers(take(alone, 4)) == numbers(take(among, 4))
    other = stream(rows)
    other.load_state_dict(states[1])
    assert 0 < other.epochs < 1


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 4), (3, 3)])
def test_on_another_number_of_ranks_the_report_is_that_of_all(rows, before, now):
    old = [stream(rows, rank=rank, world=before) for rank in range(before)]
    for one in old:
        take(one, 9)
    # Two ranks share each sequence, and have saved the same.
    states = [one.state_dict() for one in old for _ in range(2)]
    new = [stream(rows, rank=rank, world=now) for rank in range(now)]
    for one in new:
        one.load_state_dict(states)
    reports = [Report.joined(one.report for one in ones) for ones in (old, new)]
    assert reports[0] == reports[1]
    assert reports[0].skipped and reports[0].batches == 9 * before
    take(new[0], 2)
    assert Report.joined(one.report for one in old) == reports[0], "what goes on counts for itself"


@pytest.mark.parametrize("answer", ["b", "cats"], ids=["of another size", "of the same size"])
def test_a_state_of_other_data_is_refused(tmp_path, answer):
    file = jsonl(tmp_path / "train.jsonl", [chat("a", "dogs")] * 60)
    one = stream(file)
    take(one, 1)
    stream(file).load_state_dict(one.state_dict())
    jsonl(file, [chat("a", "dogs")] * 59 + [chat("a", answer)])
    with pytest.raises(ValueError, match="data have changed"):
        stream(file).load_state_dict(one.state_dict())


REWRITTEN = {
    "shorter": (lambda old: old[:40], r"had 1,\d\d\d bytes and now has 40, so this line is gone or cut off"),
    "empty": (lambda old: b"", r"now has 0"),
    "changed": (lambda old: old.replace(b"dogs", b"cats"), "this line is not what it was. Bring"),
    "longer": (lambda old: old.replace(b"dogs", b"doggies"), r"this line is not what it was, and the file had"),
}


@pytest.mark.parametrize("how", REWRITTEN)
def test_a_file_that_is_rewritten_while_it_is_read_is_an_error_by_its_line(tmp_path, how):
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


def test_states_of_earlier_versions_are_taken_where_the_table_was_not_touched(table):
    file = table()
    one = stream(file)
    take(one, 2)
    [source] = one._sources._all
    state = one.state_dict() | {"sources": [f"{file}, 20 rows, {source._rows._fingerprint}"]}
    stream(file).load_state_dict(state)
    with pytest.raises(ValueError, match="data have changed"):
        stream(table("cats")).load_state_dict(state)


def test_a_saved_folder_may_be_written_anew_while_it_is_read(table, tmp_path):
    import datasets

    datasets.Dataset.from_parquet(str(table())).save_to_disk(str(tmp_path / "saved"))
    source = open_source(str(tmp_path / "saved"))
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(b"")
    assert [source.read(i).fields["messages"][1]["content"] for i in range(len(source))] == ["dogs"] * 20


def test_large_tables_are_known_by_a_sample_of_their_rows(monkeypatch):
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


def test_what_cannot_be_used_is_told_by_file_and_line(rows):
    shown = stream(rows)
    batches = iter(shown)
    while shown.epochs < 2:
        next(batches)
    batches.close()
    skipped = shown.report.skipped
    assert set(skipped) == {"not JSON", "missing medium", "too long"}
    # Once an epoch; the third one has begun.
    assert {tally.count for tally in skipped.values()} <= {2, 3}
    for kind, line, word in (("not JSON", 8, "broken"), ("missing medium", 12, "none.png"), ("too long", 14, "160")):
        [example] = skipped[kind].examples
        assert example.startswith(f"{rows}:{line}: ")
        assert word in example
        assert example in str(shown.report)
    assert shown.report.notes["text cut"].examples[0].startswith(f"{rows}:18: ")
    with pytest.raises(ValueError, match=rf"{re.escape(str(rows))}:(8: not JSON|12: missing|14: too long)"):
        take(stream(rows, on_error="stop"), 60)


@pytest.mark.parametrize("world", [1, 4])
def test_data_without_a_usable_row_end_with_a_report(tmp_path, world):
    file = jsonl(tmp_path / "a.jsonl", ["broken", chat("a", "")])
    with pytest.raises(ValueError, match=r"none of 100 rows can be used") as found:
        take(stream(file, world=world, rank=world - 1), 1)
    assert len(found.value.args[0].splitlines()) == 5


def test_fewer_rows_than_ranks_are_shared(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [chat(f"#{i:03d}", "dog") for i in range(2)])
    for rank in range(5):
        assert set(numbers(take(stream(file, rank=rank, world=5), 2))) == {0, 1}


def test_crops_of_a_batch_are_bounded(rows):
    unbounded = take(stream(rows), 30)
    assert max(sum(len(crops.extents) for crops in batch.crops) for batch in unbounded) > 4
    bounded = stream(rows, max_crops=4)
    for batch in take(bounded, 30):
        assert sum(len(crops.extents) for crops in batch.crops) <= 4
    assert set(bounded.report.skipped) == {"not JSON", "missing medium", "too long"}


def test_a_fault_of_ours_is_not_taken_for_a_row_s(rows, monkeypatch):
    shown = stream(rows)
    monkeypatch.setattr(shown._encoder, "_text", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(shown, 60)


THREADS = """
import sys, threading
import psutil
from aria import AriaConfig, AriaProcessor
from aria.train.data import DataSettings, make_stream

def native():
    return psutil.Process().num_threads() - len(threading.enumerate())

settings = DataSettings(paths=(sys.argv[1],), workers=4)
batches = iter(make_stream(settings, AriaProcessor.from_pretrained(), AriaConfig.from_pretrained(), tokens=512))
before = native()
for _ in range(3):
    next(batches)
print(native() - before, sum(thread.name.startswith("aria-data") for thread in threading.enumerate()))
"""


def test_reading_ahead_starts_no_threads_of_pytorch_s(tmp_path):
    """With more of them than cores, those of the training would sleep whenever they wait for each other."""
    for i in range(12):
        made_data.picture(tmp_path, f"{i}.png", (400, 300 + i))
    shown = [[{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": "fox"}] for i in range(12)]
    file = jsonl(tmp_path / "train.jsonl", [{"messages": [said("user", c), said("assistant", "dog")]} for c in shown])
    command = [sys.executable, "-c", THREADS, str(file)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "4"], done.stdout + done.stderr


def test_mixtures_are_exact():
    counts, weights = [10, 7, 100, 3], [1.5, 0.5, 0.013, 2.0]
    order = Order(counts, weights, seed=5)
    first, second = order.epoch(0), order.epoch(1)
    assert order.size == len(first) == 15 + 4 + 1 + 6  # 3.5 rows round to 4, as Python rounds
    assert first.tolist() != second.tolist()
    assert sorted(first) == sorted(second), "the random halves stay those of the first epoch"
    times = Counter(first.tolist())
    assert sorted(times[i] for i in range(10)) == [1] * 5 + [2] * 5
    assert sorted(times[i] for i in range(10, 17)) == [0] * 3 + [1] * 4
    assert sum(times[i] for i in range(17, 117)) == 1
    assert [times[i] for i in range(117, 120)] == [2, 2, 2]
    anew = Order(counts, weights, seed=5, resample=True)
    assert sorted(anew.epoch(0)) != sorted(anew.epoch(1))
    assert Counter(anew.epoch(1).tolist()).total() == order.size
    assert sorted(Order(counts, weights, seed=6).epoch(0)) != sorted(first), "another seed draws other halves"
    assert [order.row(i) for i in range(2 * order.size)] == [*first, *second]
    in_turn = Order([3, 2], [1.0, 2.0], shuffle=False)
    assert in_turn.epoch(4).tolist() == [0, 1, 2, 3, 4, 3, 4]
    with pytest.raises(ValueError, match="leave no row"):
        Order([3], [0.1])


def test_noise_is_splitmix_and_permutations_are_even():
    # SplitMix64's published first outputs for seed 0, which is what no key leaves.
    assert [f"{value:016x}" for value in noise(3)] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]
    places = np.stack([permutation(6, 7, i) for i in range(6000)])
    assert (np.sort(places, axis=1) == np.arange(6)).all()
    for column in places.T:
        assert np.abs(np.bincount(column) / 6000 - 1 / 6).max() < 0.03


class Piece:
    def __init__(self, tokens: int, num_crops: int = 0):
        self.tokens, self.num_crops = tokens, num_crops


def test_the_oldest_are_packed_next_and_the_longest_fill_the_gap():
    packer = Packer(10, lookahead=2)
    packer.add([Piece(4), Piece(3), Piece(6)])
    assert not packer.ready
    packer.add([Piece(2), Piece(3), Piece(9)])
    assert packer.ready
    taken = [[item.tokens for item in packer.take()] for _ in range(3)]
    assert taken == [[4, 3, 3], [6, 2], [9]]
    assert not packer.held
    assert not packer.ready


def test_crops_bound_what_waits_and_what_is_packed():
    packer = Packer(1000, crops=4, lookahead=2)
    packer.add([Piece(5, 3), Piece(5, 2), Piece(5, 1)])
    assert not packer.ready
    packer.add([Piece(5, 2)])
    assert packer.ready
    assert [item.num_crops for item in packer.take()] == [3, 1]
    assert [item.num_crops for item in packer.take()] == [2, 2]


def test_nothing_waits_long_and_little_is_filler():
    rng = np.random.default_rng(0)
    packer = Packer(2048, lookahead=8)
    born: dict[int, int] = {}
    filled = 0
    for step in range(300):
        while not packer.ready:
            piece = Piece(int(min(2048, rng.lognormal(5.8, 0.9) + 8)))
            born[id(piece)] = step
            packer.add([piece])
            assert len(packer.held) <= 130
        taken = packer.take()
        filled += sum(piece.tokens for piece in taken)
        assert all(step - born.pop(id(piece)) <= 16 for piece in taken)
    assert filled / (300 * 2048) > 0.97


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_length": 1}, "max_length should be 3 or above, but is 1"),
        ({"workers": -1}, "workers should be 0 or above"),
        ({"mixer": {"a": 0.0}}, "'a' a weight above 0"),
        ({"mixer": {"a": 1.0}, "paths": ("a",)}, "stands in both"),
        ({"paths": ("a", "b", "a")}, "'a' more than once"),
        ({"paths": ("a", "b", "a/")}, "'a' more than once"),
        ({"paths": ("a/",), "mixer": {"a": 1.0}}, "stands in both"),
    ],
)
def test_settings_are_checked(wrong, said):
    with pytest.raises(ValueError, match=said):
        DataSettings(**wrong)
