"""Locating models: local paths, Hub repositories in the local cache without a network, and errors."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from aria.hub import MAX_JSON_DEPTH, NANO, read_json, resolve, write_json
from tests.helpers.repository import ROOT


@pytest.fixture
def offline(tmp_path, model_folder):
    """Environment of an offline machine whose Hub cache has one revision of somebody/aria."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--aria"
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    for branch in ("main", "tuned"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}


def run(environment: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    program = f"import torch; torch.set_num_threads(1)\n{code}"
    here = ROOT
    return subprocess.run([sys.executable, "-c", program], env=environment, cwd=here, capture_output=True, text=True)


@pytest.mark.slow
def test_a_repository_loads_from_the_cache_without_network(offline):
    done = run(
        offline,
        "from aria import Engine, SamplingParams\n"
        "for revision in (None, 'tuned', '0123456789abcdef0123456789abcdef01234567'):\n"
        "    engine = Engine('somebody/aria', revision=revision, device='cpu')\n"
        "    question = [{'role': 'user', 'content': 'hello'}]\n"
        "    print(len(engine.chat([question], SamplingParams(max_tokens=3))[0].token_ids))\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n3\n3\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["somebody/else", "somebody/aria@absent"])
def test_a_repository_that_is_not_cached_is_a_clear_error(offline, name):
    name, _, revision = name.partition("@")
    done = run(
        offline,
        "import traceback\n"
        "from aria import *\n"
        "from aria.checkpoint.remote import read_remote\n"
        "faces = (AriaConfig, AriaImageProcessor, AriaProcessor, AriaForConditionalGeneration)\n"
        "remote = lambda name, revision: read_remote(name, {}, revision=revision)\n"
        "for load in (Engine, *(face.from_pretrained for face in faces), remote):\n"
        f"    try: load({name!r}, revision={revision or None!r})\n"
        "    except FileNotFoundError: print(traceback.format_exc(), end='---')\n",
    )
    assert done.returncode == 0, done.stderr
    *traces, rest = done.stdout.split("---")
    assert len(traces) == 6 and not rest
    for trace in traces:
        # The errors of the library below it are 90 lines and do not help.
        assert trace.count("Traceback") == 1
        last = trace.strip().splitlines()[-1]
        assert last.startswith("FileNotFoundError: ")
        assert name in last
    assert all(revision in trace.strip().splitlines()[-1] for trace in traces[:-1])


@pytest.mark.parametrize("revision", ["../../../etc/passwd", "/etc/passwd", "a/../b", "a\0", "", "a b"])
def test_a_revision_cannot_escape_the_cache(revision):
    """Adapter folders name a revision, and the Hub cache makes a path of it."""
    with pytest.raises(ValueError, match="is not a branch, tag or commit"):
        resolve("somebody/aria", revision=revision)


@pytest.mark.parametrize("name", ["../x", "./x", "x/..", "a/b\0c", "~nobody/x"])
def test_names_with_path_components_are_not_repositories(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        resolve(name)


def test_local_paths(tmp_path):
    assert resolve() == NANO
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="revision='main' is for Hub repositories"):
        resolve(tmp_path, revision="main")
    for name in ("nowhere", "a/b/c", "../nowhere/at/all", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            resolve(name)


REFUSED: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "Expecting property name"),
    "no UTF-8": (b'{"a": "\xff"}', "invalid start byte"),
    "a list": (b"[1]", "expected an object, but it holds a list"),
    "deep lists": (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "deeper than 100 levels"),
    "lists without end": (b'{"a":' + b"[" * 200_000, "deeper than 100 levels"),
    "objects without end": (b'{"a":' * 200_000, "deeper than 100 levels"),
    "a key twice": (b'{"a": {"r": 8, "r": 9}}', "an object has the key 'r' twice"),
    "NaN": (b'{"a": {"b": [1, NaN]}}', r"a\.b\.1 is nan; expected a finite number"),
    "infinity": (b'{"a": -Infinity}', "a is -inf; expected a finite number"),
    "beyond floats": (b'{"a": 1e999}', "a is inf; expected a finite number"),
    "beyond arithmetic": (b'{"a": 1' + b"0" * 400 + b"}", "a is 1000"),
    "digits without end": (b'{"a": 1' + b"0" * 100_000 + b"}", "Exceeds the limit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_json_is_rejected_with_the_file_and_the_field(name, tmp_path):
    content, message = REFUSED[name]
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_json(file)
    assert str(file) in str(refused.value) and len(str(refused.value)) < 500


def test_json_of_reasonable_depth_and_size_is_read(tmp_path):
    deep: Any = 1
    for _ in range(MAX_JSON_DEPTH - 1):
        deep = [deep]
    data = {"a": deep, "b": [10**30, 1e200, None, True, "NaN"]}
    write_json(tmp_path / "new" / "file.json", data)
    assert read_json(tmp_path / "new" / "file.json") == data
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["file.json"]


def test_a_file_of_a_gigabyte_is_not_read(tmp_path):
    file = tmp_path / "config.json"
    with file.open("wb") as opened:
        opened.truncate(1 << 30)
    with pytest.raises(ValueError, match=r"config\.json has 1,073,741,824 bytes; at most 16,777,216 are read"):
        read_json(file)


def test_a_failed_write_keeps_the_existing_file(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    write_json(file, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_json(file, {"a": 2})
    assert read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]
