"""Conversations at the terminal: typed paths, commands and mistakes."""

from __future__ import annotations

import builtins
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from aria import Engine, SamplingParams
from aria.cli import conversation as module
from aria.cli.conversation import ChatSession, split_paths
from tests.helpers.made_media import clip, pdf
from tests.helpers.repository import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Engine:
    return Engine(model_folder, device="cpu")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    Image.radial_gradient("L").convert("RGB").resize((90, 60)).save(tmp_path / "a picture.png")
    (tmp_path / "it's.gif").write_bytes(clip(2, kind="gif", codec="gif"))
    (tmp_path / "page.pdf").write_bytes(pdf((60, 30), (60, 30)))
    (tmp_path / "notes.txt").write_text("hello")
    return tmp_path


@pytest.fixture
def talk(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Any]:
    """Type lines into a conversation; returns it, the answers and what else was printed.

    A line that is an exception is raised where it would be typed.
    """

    def call(*typed: str | BaseException, **params: Any) -> tuple[ChatSession, str, str]:
        lines = iter(typed)

        def read(_: str) -> str:
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)
        conversation = ChatSession(None, {}, SamplingParams(**{"max_tokens": 4, **params}))
        module.talk(engine, conversation)
        captured = capsys.readouterr()
        return conversation, captured.out, " ".join(captured.err.split())

    return call


def contents(conversation: ChatSession) -> list[Any]:
    return [
        message["content"] if isinstance(message["content"], str) else message["content"][-1]["text"]
        for message in conversation.messages
        if message["role"] == "user"
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="there backslashes separate folders")
def test_paths_as_they_are_typed_pasted_and_dropped(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("HOME", str(files))
    picture = str(files / "a picture.png")
    for typed in (
        "a picture.png",
        "'a picture.png'",
        '"a picture.png"',
        r"a\ picture.png",
        picture,
        f"'{picture}'",
        picture.replace(" ", r"\ "),
        "file://" + picture.replace(" ", "%20"),
        "FILE:" + picture.replace(" ", "%20"),
        "~/a picture.png",
    ):
        [path] = split_paths(typed)
        assert Path(path).expanduser().samefile(picture), typed
    assert split_paths("it's.gif") == ["it's.gif"]
    assert split_paths("it's missing.gif") == ["it's missing.gif"]
    assert split_paths("'a picture.png' page.pdf") == ["a picture.png", "page.pdf"]
    assert split_paths(r"'C:\Users\me\a.png'") == split_paths(r"C:\Users\me\a.png") == [r"C:\Users\me\a.png"]
    assert split_paths("no such file.png") == ["no such file.png"]
    assert split_paths("https://example.org/a%20b.png") == ["https://example.org/a%20b.png"]


def test_an_invalid_medium_is_refused_at_once_without_side_effects(talk: Any, files: Path) -> None:
    wrong = [f"/{kind} {files / name}" for kind, name in (
        ("image", "it's.gif.png"), ("video", "notes.txt"), ("video", "page.pdf"), ("document", "a picture.png"),
        ("document", "notes.txt"), ("image", "page.pdf"),
    )]  # fmt: skip
    conversation, out, err = talk(*wrong, "hello")
    assert err.count("error:") == len(wrong)
    assert out.count("\n") == 1 and contents(conversation) == ["hello"]
    assert len(conversation.messages[0]["content"]) == 1, "no medium stays"


def test_what_a_medium_costs_is_shown(talk: Any, files: Path) -> None:
    conversation, _, err = talk(
        f"/IMAGE\t'{files / 'a picture.png'}'", f"/video {files}/it's.gif", f"/document {files / 'page.pdf'}", "what"
    )
    assert "(128 tokens)" in err and "(2 frames, " in err and "(2 pages, " in err
    assert [part["type"] for part in conversation.messages[0]["content"]] == ["image", "video", "document", "text"]


def test_media_of_a_failed_question_are_dropped(talk: Any, files: Path, engine: Engine, monkeypatch: Any) -> None:
    stream = engine.stream

    def fails(messages: Any, *given: Any, **named: Any) -> Any:
        if len(messages[-1]["content"]) > 1:
            raise ValueError("the prompt is too long")
        return stream(messages, *given, **named)

    monkeypatch.setattr(engine, "stream", fails)
    conversation, _, err = talk(f"/image {files / 'a picture.png'}", "what is it", "hello")
    assert "error: the prompt is too long" in err
    assert contents(conversation) == ["hello"]


def test_commands_in_any_case_and_help(talk: Any) -> None:
    conversation, out, err = talk("/HELP", "/System You are brief.", "/system", "/what", "/QUIT", "never")
    for command in ("/image FILE", "/regenerate", "/save FILE", "/quit"):
        assert command in err
    assert err.count("system prompt: You are brief.") == 2 and "unknown command /what; /help lists them" in err
    assert out == "" and conversation.system == "You are brief."
    assert "unknown command /; /help" in talk("/")[2]
    assert talk("/system a", "/system -")[0].system is None


def test_commands_come_before_folders_of_their_name(talk: Any, files: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_is_file", lambda text: True)  # as macOS, where /system is /System
    conversation, out, _ = talk("/system Be brief.")
    assert conversation.system == "Be brief." and out == ""
    assert contents(talk("/etc is what?")[0]) == ["/etc is what?"]


def test_messages_show_names_with_brackets(talk: Any, files: Path) -> None:
    image = files / "a [red]x.png"
    (files / "a picture.png").rename(image)
    _, _, err = talk(f"/image {image}", f"/image {files / 'no [red]x.png'}", "/system [bold]x", "/[red]")
    for shown in (f"{image} comes with", "no [red]x.png", "system prompt: [bold]x", "unknown command /[red]"):
        assert shown in err


def test_the_system_prompt_and_options_reach_the_model(talk: Any, engine: Engine) -> None:
    system = {"role": "system", "content": "what is shown"}
    expected = engine.chat([[system, {"role": "user", "content": "hello"}]], SamplingParams(max_tokens=3))[0].text
    conversation, out, err = talk(
        "/system what is shown", "/set max_tokens 3", "/set top-p 0.5", "hello", temperature=0
    )
    assert out == expected + "\n"
    assert "sampling: max_tokens 3, top_p 0.5" in err and conversation.params.top_p == 0.5
    _, _, err = talk("/set", "/set temperature", "/set temperature 9", "/set beams 4", '/set stop ["a"]')
    assert "sampling: max_tokens 4" in err and "temperature needs a value" in err
    assert "temperature is 9" in err and "unknown sampling option beams" in err and "stop ('a',)" in err


def test_another_answer_replaces_the_last(talk: Any, monkeypatch: Any) -> None:
    torch.manual_seed(1)  # the new answer is sampled
    conversation, out, _ = talk("hello", "what", "/regenerate", temperature=0)
    first, second, third, _ = out.split("\n")
    assert contents(conversation) == ["hello", "what"] and len(conversation.messages) == 4
    assert conversation.messages[-1]["content"] == third and conversation.messages[1]["content"] == first
    assert second != third, "a second greedy answer would repeat the first"
    assert "there is no question yet" in talk("/regenerate")[2]


def test_an_interrupted_second_answer_leaves_the_first(talk: Any, engine: Engine, monkeypatch: Any) -> None:
    stream, asked = engine.stream, []

    def interrupted(*given: Any, **named: Any) -> Any:
        asked.append(given)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return stream(*given, **named)

    monkeypatch.setattr(engine, "stream", interrupted)
    conversation, out, err = talk("hello", "/regenerate")
    assert "stopped" in err and conversation.messages[1]["content"] == out.split("\n")[0]


def test_ctrl_c_at_the_prompt_does_not_exit(talk: Any) -> None:
    conversation, _, err = talk(KeyboardInterrupt(), "hello", KeyboardInterrupt(), "/quit", "never")
    assert contents(conversation) == ["hello"] and err.count("/quit or Ctrl-D to exit") == 2


def test_multiple_lines_are_one_question(talk: Any) -> None:
    conversation, _, _ = talk('"""one', "two", 'three"""', '"""four"""', '"""', "five", '"""')
    assert contents(conversation) == ["one\ntwo\nthree", "four", "five"]


def test_a_conversation_is_saved(talk: Any, files: Path) -> None:
    picture = files / "a picture.png"
    target, text = files / "saved.json", files / "my chat.md"
    (files / "taken.json").write_text("{}")
    _, out, err = talk(
        "/system Be brief.", f"/image {picture}", "what", f"/save {target}", "hello", f"/save {target}",
        f"/save '{text}'", f"/save {files / 'taken.json'}", "/save", f"/save {files / 'no' / 'folder.json'}",
    )  # fmt: skip
    first, second, _ = out.split("\n")
    assert json.loads(target.read_text(encoding="utf-8"))["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": str(picture)}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": second},
    ]
    assert f"## User\n\n![image]({picture})\n\nwhat\n" in text.read_text(encoding="utf-8")
    assert "taken.json exists; name a new file" in err and (files / "taken.json").read_text() == "{}"
    assert "which file? /save FILE" in err and err.count("error:") == 3
    assert not list(files.glob("*.partial"))


def test_history_is_kept_between_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer, "get_app_dir", lambda name: str(tmp_path / name))
    module._history().append_string("hello\nthere")
    file = tmp_path / "aria" / "chat-history"
    assert list(module._history().load_history_strings()) == ["hello\nthere"]
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(typer, "get_app_dir", lambda name: str(file / "no folder"))
    assert list(module._history().load_history_strings()) == []


def test_multiple_lines_are_edited_at_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(typer, "get_app_dir", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text("one\x1b\rtwo\rthree\x03")
        read = module._reader()
        assert read("> ") == "one\ntwo"
        with pytest.raises(KeyboardInterrupt):
            read("> ")


@pytest.mark.parametrize("arguments", [["-h"], ["chat", "-h"], ["serve", "--help"], ["data", "check", "-h"]])
def test_help_shows_no_value_after_flags(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aria", *arguments],
        capture_output=True,
        text=True,
        env=environment(COLUMNS="200"),
        check=True,
    )
    assert "Usage: aria" in done.stdout and "<bool>" not in done.stdout
