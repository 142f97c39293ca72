"""Where files of this repository are, and the environment of processes that import from it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "aria"
PICTURES = ROOT / "examples" / "pictures"
CLIPS = ROOT / "tests" / "media" / "clips"
DOCS = ROOT / "docs"


def environment(**more: str) -> dict[str, str]:
    """Of a child process that imports ``aria``, ``tests``, ``recipes`` and ``bench`` from this checkout."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
