"""The end of the server: what runs is finished or cut, and nothing keeps the process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a program can wait for")
def test_sigterm_lets_running_answers_finish(tmp_path):
    drained = tmp_path / "drained"
    # The answer cannot end before the test has seen what others get meanwhile.
    code = f"""
import pathlib, time
from aria.cli import main
from aria.engine import Engine
step, steps = Engine.step, 0
def held(self):
    global steps
    steps += 1
    while steps > 5 and not pathlib.Path({str(drained)!r}).exists():
        time.sleep(0.01)
    return step(self)
Engine.step = held
main()
"""
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--api-key", "key"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    timer = threading.Timer(300, process.kill)
    timer.start()
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        headers = {"Authorization": "Bearer key"}
        body = {"messages": HELLO, "max_tokens": 20, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{address}/v1/chat/completions", json=body, headers=headers, timeout=120) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            assert _until_not_ready(address) == 503, "while an answer runs, others are sent elsewhere"
            drained.touch()
            rest = list(lines)
        said = [json.loads(line[6:])["choices"][0] for line in [first, *rest] if line != "data: [DONE]"]
        assert rest[-1] == "data: [DONE]"
        assert said[-1]["finish_reason"] == "length"
        assert process.wait(120) == 0, process.stderr.read()
    finally:
        timer.cancel()
        process.kill()


def _until_not_ready(address: str) -> int:
    status = 200
    while status == 200:
        status = httpx2.get(f"{address}/ready").status_code
        time.sleep(0.01)
    return status
