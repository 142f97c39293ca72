"""Fine-tuning nano on flags, in small: what `examples/flags.py` shows, and the same text from all ways to answer."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from aria import AriaConfig, AriaProcessor, Engine, SamplingParams
from aria.checkpoint.adapter import read_adapter
from aria.engine import AsyncEngine
from aria.hub import NANO
from aria.train.data import DataSettings, questions
from tests.helpers import serving
from tests.helpers.tiny import transformers_twin

ROOT = Path(__file__).parents[2]
PARAMS = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Few of the pictures, and nano's own answers to the questions of before."""
    folder = tmp_path_factory.mktemp("finetune")
    sizes = ("--train", "10", "--test", "4", "--known", "17")
    for script in (("flags.py", "flags", *sizes), ("rehearse.py", "flags/known.jsonl", "flags/old.jsonl")):
        name, *arguments = script
        subprocess.run([sys.executable, ROOT / "examples" / name, *arguments], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def processor():
    return AriaProcessor.from_pretrained()


def asked(folder: Path, processor: AriaProcessor, name: str) -> list:
    return questions(DataSettings(paths=((folder / "flags" / f"{name}.jsonl").as_posix(),)), processor, 100)


@pytest.mark.slow
def test_rehearsal_has_the_answers_of_the_model(folder, processor):
    rows = asked(folder, processor, "old")
    answers = Engine(device="cpu").chat([list(row.messages) for row in rows], SamplingParams(max_tokens=128))
    assert [row.answer for row in rows] == [answer.text for answer in answers]
    seen = [part["type"] for row in rows for part in row.messages[-1]["content"] if part["type"] != "text"]
    assert len(rows) == 17, "one of each kind, and more of some"
    assert seen.count("image") == 13 and seen.count("video") == 1, "the others are about nothing to see"
    known = [json.loads(line) for line in (folder / "flags/known.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["messages"][-1]["role"] == "user" for row in known), "the questions stay without answers"


def test_flags_are_drawn_the_same_each_time(folder, tmp_path):
    sizes = ("--train", "10", "--test", "0", "--known", "0")
    subprocess.run([sys.executable, ROOT / "examples/flags.py", tmp_path, *sizes], check=True)
    assert (tmp_path / "train.jsonl").read_bytes() == (folder / "flags/train.jsonl").read_bytes()


@pytest.mark.slow
def test_merged_served_and_in_transformers_it_says_the_same(command, folder, processor, monkeypatch):
    monkeypatch.chdir(folder)
    # Another head start than the recipe's: in a few steps every answer has to differ from what nano said.
    sets = ("budget.steps=12", "optimizer.learning_rate=4e-3", "batch.tokens=384", "log.every=4", "schedule.warmup=0.0")
    arguments = [part for one in sets for part in ("--set", one)]
    assert command("train", ROOT / "recipes/flags.toml", "--out", "run", *arguments) == 0
    adapter = read_adapter("run/export", AriaConfig.from_pretrained(NANO))
    assert all("experts.fc" in name and pair.b.any() for name, pair in adapter.weights.items()), "experts are trained"
    assert command("merge", "run/export", "merged") == 0

    rows = [*asked(folder, processor, "test"), *asked(folder, processor, "old")[:4]]
    conversations = [list(row.messages) for row in rows]
    before, merged = (
        [answer.text for answer in Engine(model, device="cpu").chat(conversations, PARAMS)]
        for model in (None, "merged")
    )
    assert before[:4] != merged[:4] and all(merged)

    twin = transformers_twin(Path("merged"))
    for conversation, text in zip(conversations, merged, strict=True):
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = twin.generate(**inputs, max_new_tokens=40, do_sample=False, suppress_tokens=[9])
        theirs = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert theirs.split("<|im_end|>")[0] == text

    with AsyncEngine(device="cpu", max_batch=8, cache_tokens=4096, adapters={"flags": "run/export"}) as engine:
        monkeypatch.setattr(serving, "engine", lambda: engine)
        with serving.running() as live:
            for conversation, text, plain in zip(conversations, merged, before, strict=True):
                content = [as_openai(part) for part in conversation[0]["content"]]
                for model, wanted in (("flags", text), ("aria-nano", plain)):
                    reply = live.chat(content, model=model, max_tokens=40)
                    assert reply.choices[0].message.content == wanted


def as_openai(part: dict) -> dict:
    """A content part as OpenAI's clients send it."""
    if part["type"] != "image":
        return part
    data = base64.b64encode(Path(part["image"]).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
