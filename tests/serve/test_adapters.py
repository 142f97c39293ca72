"""Adapters by name: the server's `model` field, batches, and `--adapter` of the commands."""

from __future__ import annotations

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image

from aria import Engine, SamplingParams
from aria.checkpoint import load_model
from aria.checkpoint.adapter import save_adapter
from aria.cli.options import read_adapters
from aria.engine import AsyncEngine
from aria.model.lora import lora_modules as attached
from aria.serve.app import create_app
from aria.serve.settings import ServerSettings
from aria.train.targets import Targets, apply
from tests.helpers import serving

HELLO = [{"role": "user", "content": "hello"}]
NAMES = ("aria-nano", "words", "experts")


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    made = {}
    for name, modules in (("words", ("q_proj", "lm_head")), ("experts", ("experts.fc1", "experts.fc2"))):
        torch.manual_seed(len(name))
        model = load_model(model_folder)
        apply(model, Targets(rank=4, modules=modules))
        for adapter in attached(model).values():
            torch.nn.init.normal_(adapter.b, std=0.2)
        made[name] = tmp_path_factory.mktemp(name)
        save_adapter(model, made[name])
    return made


@pytest.fixture(scope="module")
def engine(model_folder, folders):
    with AsyncEngine(model_folder, device="cpu", adapters=folders) as engine:
        yield engine


@pytest.fixture(scope="module", autouse=True)
def served(engine):
    """Servers of these tests have the adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "engine", lambda: engine)
        yield


@pytest.fixture(scope="module")
def live(served):
    with serving.running() as live:
        yield live


def expected(engine: AsyncEngine, name: str) -> str:
    adapter = None if name == "aria-nano" else name
    return asyncio.run(engine.chat(HELLO, SamplingParams(max_tokens=12), adapter=adapter)).text


def test_models_lists_the_base_model_and_then_its_adapters(live):
    cards = [card.model_dump() for card in live.openai.models.list().data]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("aria-nano", "aria-nano", None),
        ("words", "aria-nano", "aria-nano"),
        ("experts", "aria-nano", "aria-nano"),
    ]
    assert live.openai.models.retrieve("words").model_dump() == cards[1]
    with pytest.raises(
        openai.NotFoundError, match="no model 'other'; available are aria-nano, words, experts"
    ) as raised:
        live.chat(model="other")
    assert raised.value.code == "model_not_found" and raised.value.param == "model"


@pytest.mark.slow
def test_the_model_field_selects_an_adapter(live, engine):
    answers = {name: expected(engine, name) for name in NAMES}
    assert len(set(answers.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        reported = list(pool.map(lambda name: live.chat(model=name, max_tokens=12), NAMES * 4))
    for name, answer in zip(NAMES * 4, reported, strict=True):
        assert (answer.model, answer.choices[0].message.content) == (name, answers[name])
    assert live.post("/v1/chat/completions", messages=HELLO, temperature=0, max_tokens=12).json()["model"] == NAMES[0]
    chunks = list(live.chat(model="experts", max_tokens=12, stream=True))
    assert {chunk.model for chunk in chunks} == {"experts"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answers["experts"]
    response = live.openai.responses.create(model="words", input="hello", temperature=0, max_output_tokens=12)
    assert (response.model, response.output_text) == ("words", answers["words"])
    plain = [live.openai.completions.create(model=name, prompt="hello", temperature=0, max_tokens=12) for name in NAMES]
    assert len({one.choices[0].text for one in plain}) == 3


def test_requests_are_counted_by_model(live):
    def count() -> float:
        lines = live.http.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith('aria_model_requests_total{model="words"}')
        )

    before = count()
    live.chat(model="words", max_tokens=2)
    serving.until(lambda: count() == before + 1)


def load(live, name: str, path, **fields):
    return live.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **fields)


def unload(live, name: str, **fields):
    return live.post("/v1/unload_lora_adapter", lora_name=name, **fields)


@pytest.mark.slow
def test_adapters_are_loaded_and_unloaded_at_run_time(engine, folders):
    answers = {name: expected(engine, name) for name in NAMES}
    with serving.running(ServerSettings(allow_adapter_updates=True)) as live:
        assert load(live, "more", folders["words"]).text == "Success: LoRA adapter 'more' added successfully."
        assert [card.id for card in live.openai.models.list().data] == [*NAMES, "more"]
        assert live.chat(model="more", max_tokens=12).choices[0].message.content == answers["words"]
        error = load(live, "more", folders["experts"]).json()["error"]
        assert (error["param"], error["code"]) == ("lora_name", "adapter_exists")
        assert load(live, "more", folders["experts"], load_inplace=True).status_code == 200
        assert live.chat(model="more", max_tokens=12).choices[0].message.content == answers["experts"]
        with live.chat(model="more", max_tokens=400, stream=True, extra_body={"ignore_eos": True}) as stream:
            chunks = iter(stream)
            next(chunks)
            assert unload(live, "more", lora_int_id=3).text == "Success: LoRA adapter 'more' removed successfully."
            with pytest.raises(openai.NotFoundError):
                live.chat(model="more")
            assert list(chunks)[-1].choices[0].finish_reason == "length", "requests that use it are finished"
        serving.until(lambda: not engine.engine.core.adapters.retired)
        assert [card.id for card in live.openai.models.list().data] == list(NAMES)
        for name in NAMES:
            assert live.chat(model=name, max_tokens=12).choices[0].message.content == answers[name]


def test_adapters_that_cannot_be_loaded_are_refused(engine, folders, tmp_path):
    with serving.running(ServerSettings(allow_adapter_updates=True)) as live:
        for response, status, param in (
            (load(live, "gone", tmp_path / "no-such-folder"), 404, "lora_path"),
            (load(live, "empty", tmp_path), 404, "lora_path"),
            (load(live, "aria-nano", folders["words"]), 400, "lora_name"),
            (load(live, "", folders["words"]), 400, "lora_name"),
            (load(live, "x", folders["words"], is_3d_lora_weight=True), 400, "is_3d_lora_weight"),
            (live.post("/v1/load_lora_adapter", lora_name="x"), 400, "lora_path"),
            (unload(live, "nobody"), 404, "lora_name"),
            (unload(live, "aria-nano"), 404, "lora_name"),
        ):
            assert response.status_code == status, response.text
            assert response.json()["error"]["param"] == param
    assert engine.engine.adapters == NAMES[1:]


def test_loading_adapters_requires_permission(live, folders):
    for response in (load(live, "more", folders["words"]), unload(live, "words")):
        assert response.status_code == 404
        assert "--allow-adapter-updates" in response.json()["error"]["message"]
    assert "/v1/load_lora_adapter" not in live.http.get("/openapi.json").json()["paths"]


def test_a_name_of_both_model_and_adapter_is_refused(engine):
    with pytest.raises(ValueError, match="'words' is the name of the model and of an adapter"):
        create_app(engine, ServerSettings(model_names=("aria", "words")))


def test_a_batch_selects_adapters_by_name(command, engine, model_folder, folders, tmp_path):
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": name, "messages": HELLO, "temperature": 0, "max_tokens": 12},
        }
        for name in ("base", "words", "third")
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("-m", model_folder, "--served-model-name", "base", "--adapter", f"words={folders['words']}")
    assert command("batch", source, out, *arguments) == 1, "one line asks for an unknown model"
    reported = {record["custom_id"]: record["response"] for record in map(json.loads, out.read_text().splitlines())}
    assert reported["third"]["status_code"] == 404
    for name, other in (("base", "aria-nano"), ("words", "words")):
        assert reported[name]["body"]["choices"][0]["message"]["content"] == expected(engine, other)


@pytest.mark.slow
def test_chat_and_describe_answer_with_an_adapter(command, model_folder, folders, tmp_path, capsys):
    engine = Engine(model_folder, device="cpu", adapters=folders)
    assert command("chat", "-m", model_folder, "--adapter", folders["experts"], "--max-tokens", 12, "hello") == 0
    [result] = engine.chat([HELLO], SamplingParams(max_tokens=12), adapter="experts")
    assert capsys.readouterr().out == result.text + "\n"
    Image.radial_gradient("L").convert("RGB").resize((90, 60)).save(tmp_path / "picture.png")
    reported = {}
    for name, options in ((None, ()), ("mine", ("--adapter", f"mine={folders['experts']}"))):
        out = tmp_path / f"{name}.jsonl"
        asked = ("describe", tmp_path / "picture.png", "-o", out, "-m", model_folder, "--max-tokens", 12)
        assert command(*asked, *options) == 0
        reported[name] = json.loads(out.read_text())
    assert reported["mine"]["model"] == "mine" and reported["mine"]["text"] != reported[None]["text"]
    assert command(*asked[:-2], "--max-tokens", 12) == 2, "records of another model are not resumed"
    assert "with the model 'mine'" in capsys.readouterr().err


def test_adapters_of_the_same_name_are_not_mixed_in_an_output(
    command, model_folder, folders, tmp_path, monkeypatch, capsys
):
    Image.radial_gradient("L").convert("RGB").resize((90, 60)).save(tmp_path / "picture.png")
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name / "export")
    out = tmp_path / "out.jsonl"
    asked = ("describe", tmp_path / "picture.png", "-o", out, "-m", model_folder, "--max-tokens", 4, "--adapter")
    assert command(*asked, tmp_path / "words" / "export") == 0
    before = out.read_bytes()
    assert command(*asked, tmp_path / "experts" / "export") == 2, "it has the same name but is another"
    assert "with the adapter" in capsys.readouterr().err and out.read_bytes() == before
    # Another path to the same folder is accepted.
    monkeypatch.chdir(tmp_path / "words")
    assert command(*asked, "export") == 0
    assert "1 done before" in capsys.readouterr().err and out.read_bytes() == before
    # An older output does not record the adapter; without one, the name in it is enough.
    older = {name: value for name, value in json.loads(before).items() if name not in ("base", "adapter")}
    out.write_text(json.dumps(older) + "\n")
    assert command(*asked, "export") == 2
    assert "with the adapter None" in capsys.readouterr().err
    out.write_text(json.dumps(older | {"model": model_folder.name}) + "\n")
    assert command(*asked[:-1]) == 0


def test_adapters_are_named_on_the_command_line(command, capsys, model_folder, tmp_path, folders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b=c", "x/last", "rank=4/export"):
        shutil.copytree(folders["words"], name)
    assert read_adapters(["a=b=c", "x/last"]) == {"a": "b=c", "last": "x/last"}
    folder = str(tmp_path / "rank=4" / "export")
    assert read_adapters([folder, f"mine={folder}"]) == {"export": folder, "mine": folder}
    with pytest.raises(ValueError, match="'last' is the name of the model and of an adapter"):
        read_adapters(["x/last"], taken=["aria", "last"])
    for wrong, message in (
        (["=folder"], "expected NAME=FOLDER"),
        (["name="], "expected NAME=FOLDER"),
        (["a=x", "a=y"], "two adapters are called 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_adapters(wrong)
    # A model may take minutes to load: errors in adapters are reported before.
    monkeypatch.setattr("aria.engine.engine.load_model", lambda *_, **__: pytest.fail("the model was read"))
    Path("in.jsonl").touch()
    for asked, message in (
        (
            ("chat", "-m", model_folder, "--adapter", tmp_path, "hello"),
            "not an adapter folder: it has no adapter_config",
        ),
        (("serve", model_folder, "--adapter", "mine=not/there/export"), "no file or folder 'not/there/export'"),
        (("batch", "in.jsonl", "out", "--adapter", "aria-nano=x/last"), "'aria-nano' is the name of the model and of"),
        (("serve", "--adapter", "aria-nano=x/last"), "'aria-nano' is the name of the model and of"),
    ):
        assert command(*asked) == 2
        assert message in " ".join(capsys.readouterr().err.split())
