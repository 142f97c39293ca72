"""Paths of this repository, and the environment of child processes that import from it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "aria"
PICTURES = ROOT / "examples" / "pictures"
CLIPS = ROOT / "tests" / "media" / "clips"
DOCS = ROOT / "docs"


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a child process that imports from this checkout."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
