"""Names of models: local paths, Hub repositories from the local cache without a network, and mistakes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aria.hub import NANO, resolve


@pytest.fixture
def offline(tmp_path, model_folder):
    """Environment of a machine without network whose Hub cache holds one revision of somebody/aria."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--aria"
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    for branch in ("main", "tuned"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}


def run(environment: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    program = f"import torch; torch.set_num_threads(1)\n{code}"
    here = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", program], env=environment, cwd=here, capture_output=True, text=True)


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


@pytest.mark.parametrize("name", ["somebody/else", "somebody/aria@absent"])
def test_what_is_not_in_the_cache_is_one_clear_error(offline, name):
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
        # The library's own errors below it are no help, and are 90 lines.
        assert trace.count("Traceback") == 1
        last = trace.strip().splitlines()[-1]
        assert last.startswith("FileNotFoundError: ")
        assert name in last
    assert all(revision in trace.strip().splitlines()[-1] for trace in traces[:-1])


def test_local_paths(tmp_path):
    assert resolve() == NANO
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="revision='main' is for Hub repositories"):
        resolve(tmp_path, revision="main")
    for name in ("nowhere", "a/b/c", "../nowhere/at/all", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            resolve(name)
