"""Streams of batches: exact mixtures, every row once per epoch on any ranks, the same batches after resuming."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from aria.processor.chat import Prompt
from aria.train.batch import FILLER_PIECE, Batch, Sample
from aria.train.data import DataSettings
from aria.train.data.order import RowOrder, noise, permutation
from aria.train.data.packer import Packer
from aria.train.data.report import Report
from aria.train.loss import IGNORE_INDEX
from tests.helpers import made_data
from tests.helpers.made_data import TOKENS, chat, jsonl, plain, processor, said, stream, take


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


def numbers(batches: list[Batch]) -> list[int]:
    """Of the rows in batches, in order; rows that are cut count once."""
    found = []
    for batch in batches:
        for ids in batch.input_ids.split(list(batch.lengths)):
            found += re.findall(r"#(\d\d\d)", processor().decode(ids))
    return [int(number) for number in found]


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


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 7])
@pytest.mark.parametrize(("passes", "tokens"), [(3, TOKENS), (0.5, TOKENS), (2, 4096)])
def test_a_stream_of_passes_ends_after_them(rows, world, passes, tokens):
    """Also if a batch holds more rows than exist, and on ranks with one row less."""
    seen = Counter()
    streams = [
        stream(rows, rank=rank, world=world, passes=passes, tokens=tokens, shuffle=passes != 0.5)
        for rank in range(world)
    ]
    for one in streams:
        # Stopped at the first batch, it resumes to the same end.
        seen.update(numbers(take(one, 1)))
        again = stream(rows, rank=one._rank, world=world, passes=passes, tokens=tokens, shuffle=passes != 0.5)
        again.load_state_dict(one.state_dict())
        seen.update(numbers(list(again)))
        assert again.epochs == passes and list(again) == []
    # Row 13 is too long for small batches only.
    usable = set(range(int(60 * min(1, passes)))) - (BROKEN if tokens == TOKENS else BROKEN - {13})
    assert seen == Counter({row: max(1, passes) for row in usable})


def test_epochs_count_what_was_returned(rows):
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
def test_a_stream_resumes_exactly_where_it_stopped(rows, stop):
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


def test_one_stream_stops_and_resumes(rows):
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


LETTERS = "abcdefghijkl"
PIECES = 8


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Twelve texts that each fill eight batches; a piece of one begins with its letters, in a row."""
    length = processor().tokenizer.encode(Prompt("a" * 4000))
    each = 4000 * TOKENS * PIECES // len(length) - 20
    return jsonl(tmp_path_factory.mktemp("books") / "train.jsonl", [{"text": letter * each} for letter in LETTERS])


def letters(batches: list[Batch]) -> list[str]:
    """The document of each batch."""
    return [processor().decode(batch.input_ids[4:9])[-1] for batch in batches]


def test_pieces_of_documents_are_interleaved(books):
    read = stream(books, lookahead=4)
    batches = take(read, 12 * PIECES)
    found = letters(batches)
    # The last four of the pass wait beside those of the next.
    assert all(len(set(found[i : i + 4])) == 4 for i in range(0, 8 * PIECES, 4)), "as many as lookahead says"
    assert read.epochs == pytest.approx(1.0, abs=0.02), "of documents that are under way, what was taken counts"
    # In one pass all pieces come, each once and not in the order of the text.
    passed = list(stream(books, lookahead=4).once())
    assert Counter(letters(passed)) == dict.fromkeys(LETTERS, PIECES)
    short = [i for i, batch in enumerate(passed) if batch.filler]
    assert len(short) == 12, "the last piece of each"
    last = {letters([passed[i]])[0]: letters(passed[i:]).count(letters([passed[i]])[0]) for i in short}
    assert len(set(last.values())) > 2
    in_order = letters(take(stream(books, shuffle=False, lookahead=4), 3 * PIECES))
    assert in_order == [letter for letter in LETTERS[:3] for _ in range(PIECES)]


@pytest.mark.parametrize("stop", [3, 21])
def test_a_stream_stops_and_resumes_within_documents(books, stop):
    whole = [plain(batch) for batch in take(stream(books, rank=1, world=2), stop + 9)]
    first = stream(books, rank=1, world=2)
    assert [plain(batch) for batch in take(first, stop)] == whole[:stop]
    again = stream(books, rank=1, world=2, workers=0)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert again.epochs == first.epochs
    assert [plain(batch) for batch in take(again, 9)] == whole[stop:]


def test_on_another_number_of_ranks_no_piece_is_left_out_and_few_come_twice(books):
    seen: list[Any] = []
    states = []
    for rank in range(2):
        one = stream(books, rank=rank, world=2, lookahead=2)
        seen += [(letters([batch])[0], batch.filler) for batch in take(one, 3 * PIECES)]
        states.append(json.loads(json.dumps(one.state_dict())))
    for rank in range(3):
        one = stream(books, rank=rank, world=3, lookahead=2)
        one.load_state_dict(states)
        batches = iter(one)
        while one.epochs < 1.5:
            seen.append((letters([batch := next(batches)])[0], batch.filler))
    counts = Counter(letter for letter, _ in seen)
    assert min(counts[letter] for letter in LETTERS) >= PIECES
    assert sum(1 for _, filler in seen if filler) >= 12
    assert len(seen) < 18 * PIECES + 2 * PIECES, "what was under way continues, and is not read anew"


def test_states_of_earlier_versions_resume_with_waiting_sequences(books):
    one = stream(books, rank=1, world=2)
    old = one.state_dict() | {"next": 2, "held": [[0, 6], [0, 7], [1, 0], [1, 1]]}
    one.load_state_dict(json.loads(json.dumps(old)))
    assert one.epochs == 0.0
    order = [one._order.row(number) for number in (1, 3)]
    found = letters(take(one, 4))
    assert found == [LETTERS[row] for row in order for _ in range(2)]


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
    # One rank's state alone is enough to resume from, and on its own rank the list of all is as good as it.
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


def test_unusable_rows_are_reported_by_file_and_line(rows):
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


@pytest.mark.slow
def test_crops_of_a_batch_are_bounded(rows):
    unbounded = take(stream(rows), 30)
    assert max(sum(len(crops.extents) for crops in batch.crops) for batch in unbounded) > 4
    bounded = stream(rows, max_crops=4)
    for batch in take(bounded, 30):
        assert sum(len(crops.extents) for crops in batch.crops) <= 4
    assert set(bounded.report.skipped) == {"not JSON", "missing medium", "too long"}


def test_an_error_of_the_code_is_not_an_unusable_row(rows, monkeypatch):
    shown = stream(rows)
    monkeypatch.setattr(shown._encoder, "_text", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(shown, 60)


THREADS = """
import sys, threading
import psutil
from aria import AriaConfig, AriaProcessor
from aria.train.data import DataSettings, DataStream

def native():
    return psutil.Process().num_threads() - len(threading.enumerate())

settings = DataSettings(paths=(sys.argv[1],), workers=4)
batches = iter(DataStream(settings, AriaProcessor.from_pretrained(), AriaConfig.from_pretrained(), tokens=512))
before = native()
for _ in range(3):
    next(batches)
print(native() - before, sum(thread.name.startswith("aria-data") for thread in threading.enumerate()))
"""


@pytest.mark.slow
def test_reading_ahead_starts_no_threads_of_pytorch_s(tmp_path):
    """With more threads than cores, those of the training would sleep whenever they wait for each other."""
    for i in range(12):
        made_data.picture(tmp_path, f"{i}.png", (400, 300 + i))
    shown = [[{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": "fox"}] for i in range(12)]
    file = jsonl(tmp_path / "train.jsonl", [{"messages": [said("user", c), said("assistant", "dog")]} for c in shown])
    command = [sys.executable, "-c", THREADS, str(file)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "4"], done.stdout + done.stderr


def test_mixtures_are_exact():
    counts, weights = [10, 7, 100, 3], [1.5, 0.5, 0.013, 2.0]
    order = RowOrder(counts, weights, seed=5)
    first, second = order.epoch(0), order.epoch(1)
    assert order.size == len(first) == 15 + 4 + 1 + 6  # 3.5 rows round to 4, as Python rounds
    assert first.tolist() != second.tolist()
    assert sorted(first) == sorted(second), "the random halves stay those of the first epoch"
    times = Counter(first.tolist())
    assert sorted(times[i] for i in range(10)) == [1] * 5 + [2] * 5
    assert sorted(times[i] for i in range(10, 17)) == [0] * 3 + [1] * 4
    assert sum(times[i] for i in range(17, 117)) == 1
    assert [times[i] for i in range(117, 120)] == [2, 2, 2]
    anew = RowOrder(counts, weights, seed=5, resample=True)
    assert sorted(anew.epoch(0)) != sorted(anew.epoch(1))
    assert Counter(anew.epoch(1).tolist()).total() == order.size
    assert sorted(RowOrder(counts, weights, seed=6).epoch(0)) != sorted(first), "another seed draws other halves"
    assert [order.row(i) for i in range(2 * order.size)] == [*first, *second]
    in_turn = RowOrder([3, 2], [1.0, 2.0], shuffle=False)
    assert in_turn.epoch(4).tolist() == [0, 1, 2, 3, 4, 3, 4]
    with pytest.raises(ValueError, match="leave no row"):
        RowOrder([3], [0.1])


def test_noise_is_splitmix_and_permutations_are_even():
    # SplitMix64's published first outputs for seed 0, which is what no key leaves.
    assert [f"{value:016x}" for value in noise(3)] == ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]
    places = np.stack([permutation(6, 7, i) for i in range(6000)])
    assert (np.sort(places, axis=1) == np.arange(6)).all()
    for column in places.T:
        assert np.abs(np.bincount(column) / 6000 - 1 / 6).max() < 0.03


def test_waiting_sequences_are_bounded(monkeypatch):
    monkeypatch.setattr("aria.train.data.packer.MOST_TOKENS", 200)
    packer = Packer(10, lookahead=8)
    added = 0
    while not packer.ready:
        packer.add_pieces([Piece(10) for _ in range(9)])
        added += 1
    assert added == 3, "two or three long documents are enough, and not eight"


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
