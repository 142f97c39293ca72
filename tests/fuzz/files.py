"""Folders that inputs are written into as files; they go with this process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def folder(name: str) -> Path:
    """A target's own, the same one each time."""
    made = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)
