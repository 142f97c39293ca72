"""Common clients in their own environment against ``aria serve`` with nano: ``make test-clients``.

Each script in ``scripts/`` sends requests with its client, compares the answers with nano's, and prints outcomes as
JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers.compatibility import CLIENTS, ROOT, Client

HERE = Path(__file__).parent
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
KEY = "key-of-the-tests"
HANGING_SECONDS = 600

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def address():
    """Address of a server that answers greedily."""
    command = [sys.executable, "-m", "aria.cli", "serve", "--port", "0", "--api-key", KEY, "--default-temperature", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("chat at http"), f"the server printed {line!r}"
            yield line.split()[2].rstrip(",")
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.returncode == 0


def interpreter(client: Client) -> str:
    """Return the interpreter of the client's script."""
    if client.script.endswith(".mjs"):
        node = shutil.which("node")
        if node is None:
            pytest.skip("node is not installed")
        assert (HERE / "node_modules").is_dir(), "its packages are not installed; run make test-clients"
        return node
    assert PYTHON.exists(), f"{PYTHON} is missing; run make test-clients"
    return str(PYTHON)


@pytest.mark.parametrize(
    "client",
    [pytest.param(one, marks=[] if one.fast else pytest.mark.slow, id=Path(one.script).stem) for one in CLIENTS],
)
def test_client(client, address):
    command = [interpreter(client), str(HERE / "scripts" / client.script), address, KEY]
    # A minimal environment, without the user's keys and addresses and without this environment's paths.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGING_SECONDS)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes == dict.fromkeys(client.checks, "passes"), done.stderr
