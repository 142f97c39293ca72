"""Programs started by torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers.repository import environment
from tests.helpers.spread import CASES


def torchrun(*arguments: object, ranks: int = 2, restarts: int = 0, **variables: str):
    """Run a program with torchrun and wait for its end."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *("--max-restarts", str(restarts), *map(str, arguments)),
        ],
        env=environment(OMP_NUM_THREADS="1", **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def train_on_ranks(ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Train all cases of :mod:`tests.helpers.spread` for so many ranks, and read their results by case."""
    ended = torchrun("-m", "tests.helpers.spread", folder, ranks=ranks)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return {name: torch.load(folder / f"{name}.pt") for name in CASES[ranks]}
