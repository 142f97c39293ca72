"""Files from which jobs resume: rejected and left unchanged, or read as complete records followed by a new one. Batch
files: rejected by line, or each line read back unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator

from aria.jobs.journal import Journal
from aria.serve.batch import find_lines
from tests.fuzz.draw import Draw
from tests.fuzz.files import folder

LONGEST = 1024
WORDS = (
    *(
        '{"custom_id": "a", ',
        '"method": "POST", ',
        '"url": "/v1/chat/completions", ',
        '"body": {}}',
        "\n",
        "\r\n",
        "{",
        "}",
    ),
    *('{"a": 1}', "[", "\ufeff", "\\ud800", "NaN", '"messages": []', "null", "\x00", "é"),
)
NEW = {"new": "é\ud800"}


def fuzz(data: bytes) -> None:
    draw = Draw(data)
    content = draw.rest() if draw.flag() else draw.text(WORDS, 24).encode("utf-8", "surrogatepass")
    _check_journal(content)
    _check_batch(content)


def _check_journal(content: bytes) -> None:
    file = folder("journal") / "out.jsonl"
    file.write_bytes(content)
    with Journal(file) as journal:
        try:
            records = list(journal.read())
        except ValueError:
            assert file.read_bytes() == content, "a file that is no journal was changed"
            return
        assert all(isinstance(record, dict) for record in records)
        kept = file.read_bytes()
        assert kept == b"" or kept.endswith(b"\n")
        assert content.startswith(kept) or content + b"\n" == kept, "what was written before was changed"
        journal.write(NEW)
    with Journal(file) as journal:
        assert repr(list(journal.read())) == repr([*records, NEW]), "records are not read again as they were"


def _check_batch(content: bytes) -> None:
    file = folder("journal") / "batch.jsonl"
    file.write_bytes(content)
    try:
        lines = find_lines(file)
    except ValueError as error:
        assert str(file) in str(error) and len(str(error)) < 5000
        return
    assert len({line.custom_id for line in lines}) == len(lines)
    for line in lines:
        found = json.loads(content[line.start :].split(b"\n")[0])
        assert found["custom_id"] == line.custom_id


def seeds() -> Iterator[bytes]:
    line = b'{"custom_id": "%s", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}'
    for content in (
        line % b"a" + b"\n" + line % b"b",
        b'{"a": 1}\n{"b": 2}\n{"c"',
        b'{"a": 1}\nnot JSON\n',
        b"",
        b"\n\n",
    ):
        yield b"\1" + content
    yield bytes(range(0, 200, 7))
