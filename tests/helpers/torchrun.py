"""Programs started by torchrun."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.repository import environment


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
        timeout=200,
    )
