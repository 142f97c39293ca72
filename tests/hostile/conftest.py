"""A folder for hostile media, so that each is made once a run; and where these tests can run at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("resource") is None:
    collect_ignore_glob = ["test_*.py"]  # Windows: a server there cannot be limited from outside


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where hostile media are kept."""
    return tmp_path_factory.mktemp("hostile")
