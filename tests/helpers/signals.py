"""Commands that send themselves a signal right after an event, independent of the machine's load."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.repository import ROOT, environment

_PROGRAM = """
import importlib, signal, torch
from aria.cli import main

torch.set_num_threads(1)
module, owner, method, count = {module!r}, {owner!r}, {method!r}, {count}
owner = getattr(importlib.import_module(module), owner)
inner, calls = getattr(owner, method), 0

def outer(*arguments, **named):
    global calls
    result = inner(*arguments, **named)
    calls += 1
    if calls == count:
        signal.raise_signal({number})
    return result

setattr(owner, method, outer)
main()
"""


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """Start ``aria`` with ``arguments`` on one thread."""
    return _start("import torch; torch.set_num_threads(1); from aria.cli import main; main()", arguments)


def start_interrupted(event: str, count: int, number: int, *arguments: object) -> subprocess.Popen[bytes]:
    """Start ``aria`` with ``arguments``; it gets signal ``number`` once ``event`` has returned ``count`` times.

    ``event`` names a method, ``"aria.jobs.journal:Journal.write"``.
    """
    module, _, path = event.partition(":")
    owner, _, method = path.partition(".")
    return _start(
        _PROGRAM.format(module=module, owner=owner, method=method, count=count, number=int(number)), arguments
    )


def _start(code: str, arguments: tuple[object, ...]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=environment())
