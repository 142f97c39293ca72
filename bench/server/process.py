"""`aria serve` in its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-c", "from aria.cli import main; main()")
"""`aria` with this interpreter."""


def environment() -> dict[str, str]:
    """Return the environment of a process that imports ``aria`` and ``bench`` from this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}


@contextmanager
def served(*arguments: str) -> Iterator[tuple[int, int]]:
    """Run `aria serve` on the CPU until the block ends.

    Args:
        arguments: Further arguments, such as the model.

    Yields:
        The port and the process id.
    """
    command = [*COMMAND, "serve", *arguments, "--port", "0", "--device", "cpu", "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None, "stdout is a pipe"
            line = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            if address is None:
                raise RuntimeError(f"the server did not start: {line!r}")
            yield int(address[1]), process.pid
        finally:
            process.terminate()
