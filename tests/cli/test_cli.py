"""The command line: answers, conversations, reports, and one-line errors with exit code 2."""

from __future__ import annotations

import io
import shutil
import sys
from importlib.metadata import version

import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from PIL import Image
from safetensors import safe_open

from aria import Engine, SamplingParams
from aria.cli.options import read_keys
from tests.helpers.made_media import clip, pdf

CLIP, PDF = clip(2, kind="gif", codec="gif"), pdf((60, 30))


@pytest.fixture
def run(capsys, monkeypatch, command, model_folder):
    """Run ``aria`` with arguments and typed lines; returns exit code, output and errors."""

    def call(*arguments: object, typed: str = ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = command(*arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.radial_gradient("L").convert("RGB").resize((90, 60)).save(path)
    return path


def answer(folder, messages, **settings) -> str:
    return Engine(folder, device="cpu").chat([messages], SamplingParams(**settings))[0].text


def test_one_question_about_an_image(run, model_folder, picture):
    code, out, err = run("chat", "-m", model_folder, "--image", picture, "--max-tokens", 8, "what is shown")
    parts = [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what is shown"}]
    expected = answer(model_folder, [{"role": "user", "content": parts}], max_tokens=8)
    assert (code, out, err) == (0, expected + "\n", "")


def test_image_options_reach_the_model(run, model_folder, picture):
    arguments = ("chat", "-m", model_folder, "--max-tokens", 8, "--image", picture, "what is shown")
    _, plain, _ = run(*arguments)
    _, large, _ = run(*arguments, "--max-image-size", 980)
    _, split, _ = run(*arguments, "--split")
    assert len({plain, large, split}) == 3


def test_questions_about_videos_and_documents(run, model_folder, picture, tmp_path):
    (tmp_path / "a.gif").write_bytes(CLIP)
    (tmp_path / "a.pdf").write_bytes(PDF)
    media = ("--document", tmp_path / "a.pdf", "--video", tmp_path / "a.gif", "--image", picture)
    code, out, err = run("chat", "-m", model_folder, *media, "--max-tokens", 6, "what is shown")
    parts = [
        {"type": "image", "path": picture},
        {"type": "video", "path": tmp_path / "a.gif"},
        {"type": "document", "path": tmp_path / "a.pdf"},
        {"type": "text", "text": "what is shown"},
    ]
    expected = answer(model_folder, [{"role": "user", "content": parts}], max_tokens=6)
    assert (code, out, err) == (0, expected + "\n", "")
    typed = f"/video {tmp_path / 'a.gif'}\nwhat\nis\n/document {tmp_path / 'none.pdf'}\n/video\n/quit\n"
    code, out, err = run("chat", "-m", model_folder, "--max-tokens", 3, typed=typed)
    assert code == 0 and out.count("> ") == 6
    said = "".join(err.split())  # the terminal wraps long lines
    for text in ("a.gif comes with the next question", "no document at", "which video? /video FILE"):
        assert text.replace(" ", "") in said


def test_a_conversation_remembers_until_it_is_reset(run, model_folder, picture):
    lines = [
        "hello",
        f"/image {picture}",
        "what is",
        "/image nowhere.png",
        "/what",
        "",
        "/reset",
        "hello",
        "/quit",
        "never",
    ]
    code, out, err = run("chat", "-m", model_folder, "--max-tokens", 6, typed="\n".join(lines))
    first = answer(model_folder, [{"role": "user", "content": "hello"}], max_tokens=6)
    history = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what is"}]},
    ]
    second = answer(model_folder, history, max_tokens=6)
    assert code == 0
    assert out.replace("> ", "") == f"{first}\n{second}\n{first}\n"
    assert "nowhere.png" in err
    assert "unknown command /what" in err
    assert "never" not in err


def test_an_image_is_read_once(run, model_folder, picture, monkeypatch):
    class Typed(io.StringIO):
        def readline(self, *arguments):
            picture.unlink(missing_ok=True)
            return super().readline(*arguments)

    monkeypatch.setattr(io, "StringIO", Typed)
    lines = "what is\nhello\n/quit\n"
    code, out, err = run("chat", "-m", model_folder, "--image", picture, "--max-tokens", 5, typed=lines)
    assert code == 0
    assert "error" not in err
    assert not picture.exists()
    assert out.count("> ") == 3


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip() == version("aria-moe")


def test_end_of_input_ends_a_conversation(run, model_folder):
    code, out, _ = run("chat", "-m", model_folder, typed="")
    assert (code, out.replace("> ", "")) == (0, "")


def test_inspect_names_layout_parts_and_memory(run, model_folder):
    code, out, _ = run("inspect", model_folder)
    assert code == 0
    for text in (
        "hub",
        "float32",
        "8 routed, 3 a token",
        "490 px -> 128 tokens",
        "routed experts",
        "int4",
        "CPU memory",
    ):
        assert text in out


def test_inspect_needs_no_weights_of_a_hub_repository(run, model_folder, tmp_path, monkeypatch):
    with safe_open(model_folder / "model.safetensors", framework="pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (not a dict)
        tensors = {key: TensorInfo(one.get_dtype(), one.get_shape(), (0, 0)) for key, one in slices.items()}
    files = {"model.safetensors": SafetensorsFileMetadata({}, tensors)}
    metadata = SafetensorsRepoMetadata(None, False, dict.fromkeys(tensors, "model.safetensors"), files)
    shutil.copy(model_folder / "config.json", tmp_path)
    monkeypatch.setattr("aria.hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("aria.checkpoint.remote.get_safetensors_metadata", lambda *_, **__: metadata)
    code, out, _ = run("inspect", "someone/small-aria")
    assert code == 0
    assert "hub (rhymes-ai/Aria today" in out and "float32" in out
    code, out, _ = run("inspect", tmp_path)
    assert code == 0
    assert "has no weights" in out


def test_a_converted_model_answers_alike(run, model_folder, tmp_path):
    code, out, _ = run("convert", model_folder, tmp_path / "out")
    assert code == 0
    assert "tokenizer.model" in out
    messages = [{"role": "user", "content": "hello"}]
    assert answer(tmp_path / "out", messages, max_tokens=6) == answer(model_folder, messages, max_tokens=6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "-m", "/no/such/model", "hi"), "/no/such/model"),
        (("chat", "--image", "nowhere.png", "hi"), "nowhere.png"),
        (("chat", "--video", __file__, "hi"), "cannot be read as a clip"),
        (("chat", "--document", __file__, "hi"), "cannot be read: it is not a PDF"),
        (("chat", "--schema", "nowhere.json", "hi"), "no JSON schema at 'nowhere.json'"),
        (("chat", "--temperature", "3", "hi"), "temperature is 3.0; expected a number from 0 to 2"),
        (("chat", "--device", "cuda:99", "hi"), "device 'cuda:99' is not on this machine; PyTorch finds cpu"),
        (("inspect", "/no/such/model"), "/no/such/model"),
        (("convert", "/no/such/model", "out"), "/no/such/model"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


def test_debug_shows_the_traceback(run):
    with pytest.raises(FileNotFoundError):
        run("inspect", "/no/such/model", "--debug")


def test_unknown_options_are_refused_by_name(run):
    code, _, err = run("chat", "--beams", "4", "hi")
    assert code == 2
    assert "--beams" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no API key, so that anybody could use the server"),
        (b"\n \n\r\n", "holds no API key"),
        (b"key\xff", "is not UTF-8"),
        ("schlüssel".encode(), "key 1 holds a character that is not allowed in a header"),
        (b"one\ntwo words", "key 2 holds a character that is not allowed in a header"),
        (b"\x89PNG\r\n\x1a\n\0", "is not UTF-8"),
        (b"a\0b", "key 1 holds a character"),
        (b"k" * (1 << 20) + b"k", "has 1,048,577 bytes; at most 1,048,576 are read"),
    ],
)
def test_invalid_key_files_do_not_start_a_server(run, tmp_path, content, message):
    file = tmp_path / "keys"
    file.write_bytes(content)
    code, _, err = run("serve", "--api-key-file", file)
    assert code == 2 and message in " ".join(err.split())


def test_a_key_file_is_read_as_editors_write_it(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two-2_!~\r\n")
    assert read_keys(file) == ["one", "two-2_!~"]
    with pytest.raises(FileNotFoundError, match="no file of API keys"):
        read_keys(tmp_path / "nowhere")
