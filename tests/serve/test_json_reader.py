"""`JsonReader` parses what Python's own parser does, from pieces of any size, and lets other threads run."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from functools import partial
from typing import Any

import pytest

from aria.serve import json_reader
from aria.serve.errors import ApiError
from aria.serve.json_reader import MAX_CHARACTERS, MAX_VALUES, PIECE, JsonReader, parse

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]
LETTERS = ["a", '"', "\\", "\n", "é", "😀", "\u2028", "\x7f", "/", "\ud83d", "b" * 50]


def read(data: bytes, sizes: random.Random | int = PIECE) -> Any:
    reader, start = JsonReader(), 0
    while start < len(data):
        end = start + (sizes if isinstance(sizes, int) else sizes.randrange(1, 1 + sizes.choice([1, 50, 5000, PIECE])))
        reader.feed(data[start:end])
        start = end
    assert reader.received == len(data)
    return reader.parse()


def text(choice: random.Random) -> str:
    return "".join(choice.choice(LETTERS) for _ in range(choice.choice([0, 3, 30, 300, 3000])))


def value(choice: random.Random, depth: int = 0) -> Any:
    kind = choice.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [value(choice, depth + 1) for _ in range(choice.randrange(5))]
    if kind == 7:
        return {str(i) + text(choice)[:100]: value(choice, depth + 1) for i in range(choice.randrange(5))}
    return choice.choice([0, -5, 1.5, 1e300, None, True, False, 10**30]) if kind == 0 else text(choice)


def outcome(read: Any) -> Any:
    """The result of reading, or the server's error."""
    try:
        return repr(read())
    except json.JSONDecodeError as error:
        return f"the body is not JSON: {error.msg} at character {error.pos}"
    except UnicodeDecodeError as error:
        return f"byte {error.start}"
    except ApiError as error:
        return f"byte {error.message.rpartition(' ')[2]}" if "not valid" in error.message else error.message


@pytest.mark.parametrize("seed", range(40))
def test_documents_parse_as_with_pythons_parser(seed: int) -> None:
    choice = random.Random(seed)
    for _ in range(5):
        made = value(choice)
        document = json.dumps(made, ensure_ascii=choice.random() < 0.5, indent=choice.choice([None, 2]))
        data = document.encode(choice.choice(ENCODINGS), "surrogatepass")
        assert read(data, choice) == json.loads(data)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_documents_have_the_same_errors_as_with_pythons_parser(seed: int) -> None:
    choice = random.Random(seed)
    for _ in range(10):
        data = bytearray(json.dumps(value(choice), ensure_ascii=choice.random() < 0.5).encode("utf-8", "surrogatepass"))
        if len(data) > 3:
            data[choice.randrange(len(data))] = choice.choice(b'"\\{[,u\x00\xff1')
            data = data[: choice.choice([len(data), choice.randrange(3, len(data))])]
        assert outcome(partial(read, bytes(data), choice)) == outcome(partial(json.loads, bytes(data)))


def test_surrogate_pairs_survive_any_split() -> None:
    document = b'["' + b"a" * PIECE + b"\\ud83d\\ude00" * 9 + b"\\ud83d\\ud83d\\ude00\\ud83d" + b'"]'
    for size in range(1, 14):
        reader = JsonReader()
        reader.feed(document[:PIECE])
        for start in range(PIECE, len(document), size):
            reader.feed(document[start : start + size])
        assert reader.parse() == json.loads(document)


@pytest.mark.parametrize(
    ("document", "status", "says"),
    [
        (b"[" + b"1," * MAX_VALUES + b"1]", 413, "commas and brackets"),
        (b"[" * (MAX_VALUES + 1), 413, "commas and brackets"),
        (b" " * (MAX_CHARACTERS + 1), 413, "characters beside"),
        (b"1" * (MAX_CHARACTERS + 1), 413, "characters beside"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b"1" * 5000, 400, "number that is too long"),
        (b'{"' + b"a" * 100_000 + b'": 1}', 400, "Name of more than"),
        (('["' + "a" * json_reader.MAX_NON_ASCII + 'é"]').encode(), 413, "not ASCII"),
        (b"", 400, "not JSON"),
    ],
    ids=["values", "brackets", "spaces", "digits", "depth", "number", "name", "wide", "empty"],
)
def test_documents_that_cost_too_much_are_refused(document: bytes, status: int, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        read(document)
    assert caught.value.status == status


def test_commas_and_brackets_inside_strings_do_not_count() -> None:
    """Inside strings they are text, even as escapes."""
    many = MAX_VALUES + 1
    for document in (
        b'["' + b",[" * many + b'"]',
        b'["' + b"\\u002c" * many + b'"]',
        b"[" + b'",,,,",' * 200_000 + b"1]",
    ):
        assert read(document) == json.loads(document)
    # JSON inside a JSON string is parsed a second time.
    with pytest.raises(ValueError, match="commas and brackets"):
        parse(read(b'"[' + b"\\u0030\\u002c" * many + b'0]"'))


def test_memory_is_counted_while_it_is_held() -> None:
    for letter in ("a", "é", "字", "😀"):
        said, reader = letter * 1_000_000, JsonReader()
        data = json.dumps([said], ensure_ascii=False).encode()
        for start in range(0, len(data), PIECE):
            reader.feed(data[start : start + PIECE])
            # Some of it is not counted yet: pieces, and the beginning of a long string.
            assert reader.nbytes <= sys.getsizeof(said) + PIECE
        assert abs(reader.nbytes - sys.getsizeof(said)) < 10_000
    reader = JsonReader()
    reader.feed(b"[" + b"{}," * 20_000 + b"1]")
    assert reader.parsed_nbytes > sum(sys.getsizeof(one) for one in reader.parse())


@pytest.mark.parametrize(
    "document",
    [
        b'["' + b"a" * (48 << 20) + b'"]',
        b'["' + b"\\u002c" * (4 << 20) + b'"]',
        b"[" + b'"' + b'","'.join([b"a" * 2000] * 10_000) + b'"]',
        b"[" + b"1234567," * 400_000 + b"1]",
    ],
    ids=["string", "escapes", "strings", "values"],
)
def test_other_threads_run_meanwhile(document: bytes) -> None:
    """Without that, parsing one document would block all other threads."""
    slept: list[float] = []
    over = threading.Event()

    def sleep() -> None:
        while not over.is_set():
            began = time.perf_counter()
            time.sleep(0.001)
            slept.append(time.perf_counter() - began)

    def timed(work: Any) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    complete = timed(lambda: json.loads(document))
    thread = threading.Thread(target=sleep)
    thread.start()
    try:
        read(document)
    finally:
        over.set()
        thread.join()
    slept.sort()
    assert slept[int(len(slept) * 0.9)] < max(complete / 3, 0.1), f"Python's own parser takes {complete:.3f} s"
