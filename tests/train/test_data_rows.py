"""Formats of rows: the authors', OpenAI's, ours and Hugging Face's mean the same, and problems are reported by kind."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aria.serve import generation_request
from aria.serve.protocol import ChatRequest
from aria.train.data import DataSettings, questions
from aria.train.data.encode import RowEncoder
from aria.train.data.report import RowError
from aria.train.data.rows import Conversation, MediaDefaults, read_row
from aria.train.data.sources import Row, Sources, open_source
from tests.helpers import made_data, made_media
from tests.helpers.made_data import chat, jsonl, processor, said

DEFAULTS = MediaDefaults(8, True, (28, 56))


def read(fields, folder="/data"):
    return read_row(Row(fields, "rows.jsonl:1", Path(folder)), DEFAULTS)[0]


def test_the_authors_format():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "1?"},
                                         {"type": "image", "text": ""}]},
            {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
        ],
        "images": ["media/a.png", "/elsewhere/b.png"],
        "video": None,
    }  # fmt: skip
    conversation = read(row)
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0]["content"] == [
        {"type": "image", "image": Path("/data/media/a.png")},
        {"type": "text", "text": "1?"},
        {"type": "image", "image": Path("/elsewhere/b.png")},
    ]
    assert conversation.trained_on == (False, True)
    clip = {**row, "images": None, "video": {"path": "c.mp4", "num_frames": 4}}
    clip["messages"] = [{"role": "user", "content": [{"type": "video", "text": None}]}, said("assistant", "one")]
    [part] = read(clip).messages[0]["content"]
    assert part == {"type": "video", "num_frames": 4, "timestamps": True, "video": Path("/data/c.mp4")}


def test_openais_format_is_read_as_the_server_reads_it():
    parts = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low", "split": True}},
        {"type": "video_url", "video_url": {"url": "https://example.org/b.mp4", "fps": 1.5, "max_frames": 9}},
        {"type": "file", "file": {"file_data": "QUJD", "pages": "1-2"}},
        {"type": "file", "file": {"file_url": "https://example.org/c.pdf", "detail": "high", "filename": "c.pdf"}},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, "é"]}'}}
    function = {"name": "add", "description": "sums", "parameters": {"type": "object"}}
    messages = [
        said("developer", "be brief"),
        said("user", parts),
        {"role": "assistant", "content": "let me see", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": "3", "name": "add"},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    tools = [{"type": "function", "function": function}]
    body = ChatRequest.model_validate({"messages": messages, "tools": tools})
    served = generation_request.messages(body.messages, [function], (28, 56))
    ours = read({"messages": messages, "tools": tools}).messages
    roles = {"developer": "system"}
    assert [roles.get(m["role"], m["role"]) for m in ours] == [m["role"] for m in served]
    for mine, theirs in zip(ours, served, strict=True):
        if isinstance(theirs["content"], str):
            assert mine["content"] == theirs["content"]
            continue
        for a, b in zip(mine["content"], theirs["content"], strict=True):
            if a["type"] != "text":
                a["url"] = a.pop(a["type"])
            # Sizes that nobody asked for are the recipe's business here, as are timestamps.
            a.pop("timestamps", None)
            if "document" in b:  # in base64, which stays as it came until it is read
                a.pop("url")
            assert a == {key: value for key, value in b.items() if key in a}
            assert b.keys() - a.keys() <= {"max_image_size", "document"}
    assert '<tool_call>{"name": "add", "arguments": {"a": [1, "é"]}}</tool_call>' in ours[2]["content"]
    # Many data sets have arguments as they are, and not in a string.
    plain = {**call, "function": {"name": "add", "arguments": {"a": [1, "é"]}}}
    messages[2] = {**messages[2], "tool_calls": [plain, plain]}
    assert read({"messages": messages, "tools": tools}).messages[2] == ours[2]


def test_images_of_a_system_message_stay_when_tools_are_added(tmp_path):
    made_data.picture(tmp_path, "a.png")
    sheet = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Brand sheet."}]
    row = {"messages": [said("system", sheet), said("user", "a"), said("assistant", "b")]}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    encoder = RowEncoder(processor(), made_data.config(), DataSettings(), 512)
    [alone], [with_tools] = (encoder(Row({**row, **more}, "", tmp_path)).samples for more in ({}, {"tools": tools}))
    assert alone.num_crops == with_tools.num_crops == 1
    text = processor().decode(with_tools.input_ids)
    assert "<fim_suffix>Brand sheet.\n\nYou may call functions." in text
    # Text in parts reads as text in one piece.
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]
    messages = [said("user", "a"), said("assistant", "b")]
    whole, pieces = (
        read({"messages": [said("system", content), *messages], "tools": tools}).messages[0]["content"]
        for content in ("Be brief.", parts)
    )
    assert whole == pieces and whole.startswith("Be brief.\n\nYou may")


def test_answers_in_parts_read_as_the_server_reads_them():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    blank = [{"type": "text", "text": ""}]
    answers = [
        {"role": "assistant", "content": content, **more}
        for content in (None, "", [], blank, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
        for more in ({"tool_calls": [call, call]}, {"refusal": "no"})
    ]
    messages = [said("user", "a"), *answers]
    served = generation_request.messages(ChatRequest.model_validate({"messages": messages}).messages, [], (28, 56))
    assert [one["content"] for one in read({"messages": messages}).messages] == [one["content"] for one in served]


def test_paths_are_relative_to_the_file_and_urls_stay(tmp_path):
    part = {"type": "image_url", "image_url": "pictures/a.png"}
    assert read(chat_of(part)).messages[0]["content"][0]["image"] == Path("/data/pictures/a.png")
    for address in ("https://example.org/a.png", "data:image/png;base64,AAAA"):
        assert read(chat_of({"type": "image", "url": address})).messages[0]["content"][0]["image"] == address


def chat_of(part: dict) -> dict:
    return {"messages": [said("user", [part]), said("assistant", "dog")]}


SEEN = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
CALLED = {"name": "f", "arguments": {"x": 1}}
HEARD = [{"type": "video"}, {"type": "text", "text": "Go on."}]
OTHER = {
    "ShareGPT": (
        {"id": 1, "system": "Be brief.", "conversations": [{"from": "human", "value": "a?"},
                                                           {"from": "gpt", "value": "b"}]},
        {"messages": [said("system", "Be brief."), said("user", "a?"), said("assistant", "b")]},
    ),
    "ShareGPT in messages": (
        {"messages": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
        chat("a?", "b"),
    ),
    "LLaVA": (
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                             {"from": "gpt", "value": "b"}]},
        {**chat(SEEN, "b"), "images": ["a.png"]},
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, chat("Add.\n\n1 2", "3")),
    "Alpaca without input": ({"instruction": "Say hi.", "input": "", "output": "hi"}, chat("Say hi.", "hi")),
    "a pair": ({"prompt": "a?", "completion": "b"}, chat("a?", "b")),
    "ms-swift's query": (
        {"query": "<image>What is it?", "response": "b", "images": ["a.png"], "history": [["c?", "d"]]},
        {"messages": [*chat("c?", "d")["messages"], *chat(SEEN, "b")["messages"]], "images": ["a.png"]},
    ),
    "ms-swift": (
        {**chat("<image>What is it?", "b"), "images": ["a.png"]}, {**chat(SEEN, "b"), "images": ["a.png"]},
    ),
    "ms-swift's clips": (
        {**chat("<video>Go on.", "b"), "videos": ["a.mp4"]}, {**chat(HEARD, "b"), "videos": ["a.mp4"]},
    ),
    "one picture of a name that is not read": (
        {**chat("<image>What is it?", "b"), "image": "a.png"}, {**chat(SEEN, "b"), "images": ["a.png"]},
    ),
    "ShareGPT's calls, as LLaMA-Factory has them": (
        {"conversations": [
            {"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "b"},
        ], "tools": '[{"name": "f", "parameters": {}}]'},
        {"messages": [
            said("user", "a"), said("assistant", "", tool_calls=[{"type": "function", "function": CALLED}]),
            said("tool", "2"), said("assistant", "b"),
        ], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ),
    "roles of other formats, beside what messages have": (
        {"messages": [said("human", "a"), said("model", "b", weight=0), said("gpt", "c", tool_calls=None)]},
        {"messages": [said("user", "a"), said("assistant", "b", weight=0), said("assistant", "c", tool_calls=None)]},
    ),
    "input and output": ({"input": "a", "output": "b"}, chat("a", "b")),
}  # fmt: skip
"""Rows in other formats, and what they should be."""


def converted(old: Path) -> list[dict]:
    new = old.with_name("new.jsonl")
    script = Path(__file__).parents[2] / "examples" / "convert.py"
    subprocess.run([sys.executable, str(script), str(old), str(new)], check=True, capture_output=True)
    source = open_source(str(new))
    return [dict(source.read(i).fields) for i in range(len(source))]


def test_rows_in_other_formats_are_converted(tmp_path):
    rows, expected = zip(*OTHER.values(), strict=True)
    for name in ("list.json", "lines.json"):
        text = json.dumps(rows, indent=2) if name == "list.json" else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert converted(tmp_path / name) == list(expected)
    for row in expected:
        assert isinstance(read(row), Conversation)
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    assert converted(tmp_path / "a.json") == list(expected)
    (tmp_path / "a.tsv").write_text("question\tanswer\na\u2028?\tb\n", encoding="utf-8")
    assert converted(tmp_path / "a.tsv") == [chat("a\u2028?", "b")]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert converted(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.json", '[{"text": "a"}]', "one JSON value"),
        ("a.json", '{"data": [{"text": "a"}]}\n', "one JSON value"),
        ("a.json", '{"data": [\n{"text": "a"}]}\n', "one JSON value"),
        ("a.json", '{"text": "a"}\n{"text": "b"}\n', "one JSON object a line: name it .jsonl"),
        ("a.txt", "once upon a time", "plain text"),
        ("a.csv", "question,answer", "a table"),
        ("a.jsonl", '[\n{"text": "a"},\n{"text": "b"}\n]\n', "a list"),
        ("a.jsonl", '\ufeff[{"text": "a"}, {"text": "b"}]', "a list"),
        ("a.jsonl", '{\n  "text": "a"\n}\n', "several lines"),
    ],
)
def test_files_in_other_formats_are_named_with_what_helps(tmp_path, name, content, what):
    (tmp_path / name).write_text(content, encoding="utf-8")
    helps = "name it" if "name it" in what else "convert it: python examples/convert.py"
    with pytest.raises(ValueError, match=rf"{name} .*{what}.*{helps if helps not in what else ''}"):
        open_source(str(tmp_path / name))
    if not name.endswith(".jsonl"):
        with pytest.raises(FileNotFoundError, match=rf"no train\.jsonl; there is no .*, only {name}; .*{what}"):
            open_source(str(tmp_path))


BAD = {
    "no messages": [{"prompt": "a"}, {}],
    "other format": [row for row, *_ in OTHER.values()],
    "empty text": [{"text": " \n"}, {"text": 3}],
    "bad message": [
        {"messages": []},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [said("user", "a"), said("assistant", "b", weight=0.5)]},
        {"messages": [said("user", "a", tone="kind"), said("assistant", "b")]},
        {"messages": [said("user", {"type": "text"}), said("assistant", "b")]},
        chat_of({"type": "audio", "path": "a.wav"}),
        chat_of({"type": "text", "text": None}),
        chat_of({"type": "image", "path": "a.png", "url": "b.png"}),
        chat_of({"type": "image", "path": "a.png", "text": "a caption"}),
        chat_of({"type": "image_url", "image_url": {"url": "a.png", "detail": "tiny"}}),
        chat_of({"type": "image_url", "image_url": {"url": "a.png", "size": 3}}),
        chat_of({"type": "document"}),
        {**chat_of({"type": "video"}), "video": {"path": "c.mp4", "frames": 3}},
        {"messages": [said("user", "a"), {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        {**chat("a", "b"), "tools": [{"name": "f"}]},
    ],
    "unknown role": [{"messages": [said("narrator", "a"), said("assistant", "b")]}, {"messages": [{"content": "a"}]}],
    "no answer": [{"messages": [said("user", "a")]}],
    "nothing to learn": [{"messages": [said("user", "a"), said("assistant", "b", weight=0)]}],
    "empty answer": [chat("a", " "), chat("a", None), chat("a", [])],
    "media count": [
        {**chat_of({"type": "image"}), "images": []},
        {**chat_of({"type": "image"}), "images": ["a.png", "b.png"]},
        chat_of({"type": "video"}),
        {**chat("a", "b"), "images": ["a.png"]},
        {**chat_of({"type": "video"}), "video": "a.mp4", "videos": ["a.mp4"]},
    ],
    "missing medium": [
        chat_of({"type": "image_url", "image_url": {"url": ""}}),
        {**chat_of({"type": "image"}), "images": [{"bytes": None, "path": None}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), [(kind, row) for kind, rows in BAD.items() for row in rows])
def test_problems_are_reported_by_kind(kind, fields):
    with pytest.raises(RowError) as error:
        read(fields)
    assert error.value.kind == kind
    assert len(str(error.value)) < 250


def test_lines_are_found_by_their_number(tmp_path):
    rows = ["\ufeff" + json.dumps(chat("first", "x")), "", '\ufeff{"text": "é"}\r', "  ", "[1]"]
    file = jsonl(tmp_path / "a.jsonl", [*rows, b'{"text": "\xff"}', '{"text": '])
    file.write_bytes(file.read_bytes() + b'{"text": "no newline at the end"}')
    source = open_source(str(file))
    assert len(source) == 6
    assert source.read(0).fields == chat("first", "x")
    assert source.read(1) == Row({"text": "é"}, f"{file}:3", tmp_path)
    assert source.read(5).fields == {"text": "no newline at the end"}
    for row, line, kind in ((2, 5, "not JSON"), (3, 6, "not UTF-8"), (4, 7, "not JSON")):
        assert source.where(row) == f"{file}:{line}"
        with pytest.raises(RowError) as error:
            source.read(row)
        assert error.value.kind == kind


def test_names_of_data_sets(tmp_path):
    jsonl(tmp_path / "set" / "train.jsonl", [chat("a", "b")])
    jsonl(tmp_path / "set" / "test.jsonl", [chat("a", "b")] * 3)
    assert [len(open_source(str(tmp_path / "set"), split)) for split in ("train", "test")] == [1, 3]
    with pytest.raises(FileNotFoundError, match=r"no dev\.jsonl; there are test\.jsonl, train\.jsonl"):
        open_source(str(tmp_path / "set"), "dev")
    with pytest.raises(FileNotFoundError, match="hf:rhymes-ai/data"):
        open_source("rhymes-ai/data")
    for name, content in (("empty.jsonl", b""), ("blank.jsonl", b"\n \n"), ("a.bin", b"a,b")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            open_source(str(tmp_path / name))
    with pytest.raises(ValueError, match="names no data set"):
        Sources({})


def test_data_sets_of_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    array = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": str(i)}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "dog"}]}],
         "images": [{"bytes": buffer.getvalue(), "path": None}]}
        for i in range(3)
    ]  # fmt: skip
    made = datasets.Dataset.from_list(rows)
    decoded = made.cast_column("images", datasets.List(datasets.Image()))
    made.to_parquet(tmp_path / "a.parquet")
    decoded.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": decoded, "test": decoded.select([0])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "0.png").write_bytes(buffer.getvalue())
    encoder = RowEncoder(processor(), made_data.config(), DataSettings(), 256)
    for i in range(3):
        beside = {"messages": rows[i]["messages"], "images": ["0.png"]}
        [expected] = encoder(Row(beside, "", tmp_path)).samples
        for name in ("a.parquet", "saved", "splits"):
            source = open_source(str(tmp_path / name))
            assert len(source) == 3
            row = source.read(i)
            assert row.where == f"{tmp_path / name}:{i + 1}"
            [sample] = encoder(row).samples
            assert sample.input_ids.tolist() == expected.input_ids.tolist()
            assert (sample.crops[0].pixels == expected.crops[0].pixels).all()
    assert len(open_source(str(tmp_path / "splits"), "test")) == 1
    with pytest.raises(ValueError, match="no split 'dev', only train, test"):
        open_source(str(tmp_path / "splits"), "dev")


def test_questions_end_before_the_last_answer(tmp_path):
    made_data.picture(tmp_path, "a.png")
    shown = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "which?"}]
    two = {"messages": [said("user", shown), said("assistant", "dog"), said("user", "and?"),
                        said("assistant", [{"type": "text", "text": "fox"}])]}  # fmt: skip
    drawn = {"messages": [said("user", "draw"), said("assistant", [{"type": "text", "text": "so: "}, *shown])]}
    file = jsonl(tmp_path / "a.jsonl", ["broken", {"text": "plain"}, two, chat("a", "b"), drawn, chat("c", "d")])
    first, second, third = questions(DataSettings(paths=(str(file),)), processor(), 3)
    assert (first.answer, second.answer) == ("fox", "b")
    assert third.answer == "so: <fim_prefix><|img|><fim_suffix>which?", "a picture is not left out in silence"
    assert [message["role"] for message in first.messages] == ["user", "assistant", "user"]
    prepared = processor().prepare(first.messages)
    assert len(prepared.images) == 1


def test_a_document_in_base64_is_read():
    import base64

    data = base64.b64encode(made_media.pdf((100, 100))).decode()
    [sample] = RowEncoder(processor(), made_data.config(), DataSettings(split_image=False), 256)(
        Row(chat_of({"type": "file", "file": {"file_data": data}}), "", Path())
    ).samples
    assert len(sample.crops) == 1
    assert "Page 1: <fim_prefix>" in processor().decode(sample.input_ids)


WHOLE = {
    "messages": [
        said("system", "x"),
        said("user", [{"type": "image", "text": None}, {"type": "text", "text": "a"},
                      {"type": "video_url", "video_url": {"url": "a.mp4", "num_frames": 3}},
                      {"type": "file", "file": {"file_data": "QUJD", "detail": "low"}}, {"type": "video"}]),
        said("assistant", "b", weight=1,
             tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        said("tool", "x", name="f"),
        {"role": "assistant", "content": None, "refusal": "no"},
    ],
    "images": ["a.png"],
    "video": {"path": "c.mp4", "num_frames": 3},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}  # fmt: skip
WRONG = [None, 1, 0, 1.5, "", "x", [], {}, [1], [[]], [{}], {"a": 1}, True, "\ud800", [None], 10**30, {"url": 1}]


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def test_any_bad_row_is_a_row_error():
    encoder = RowEncoder(processor(), made_data.config(), DataSettings(), 4096)
    kinds = set()
    for path in list(places(WHOLE))[1:]:
        for wrong in WRONG:
            row = json.loads(json.dumps(WHOLE))
            inner = row
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = wrong
            with pytest.raises(RowError) as error:
                encoder(Row(row, "", Path("/nowhere")))
            kinds.add(error.value.kind)
            assert len(str(error.value)) < 400
    assert {"bad message", "unknown role", "media count", "missing medium", "no messages", "empty answer"} <= kinds


def test_the_documentation_s_examples_are_rows():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = []
    for block in text.split("```json\n")[1:]:
        block = block.split("```")[0].strip()
        while block:
            row, end = json.JSONDecoder().raw_decode(block)
            examples.append(read(row))
            block = block[end:].strip()
    assert [sum(one.trained_on) for one in examples] == [1, 1, 1]
    kinds = [
        [part["type"] for m in one.messages for part in m["content"] if isinstance(part, dict)] for one in examples
    ]
    assert kinds[2] == ["text", "image", "document"]
