"""What the package asks of the machine it is installed on."""

from __future__ import annotations

import ast
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_newer_interpreters_and_libraries_are_not_shut_out():
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"]]
    for requirement in ["python" + PROJECT["requires-python"], *needed]:
        specifier = requirement.partition(";")[0]
        assert "<" not in specifier and "==" not in specifier and "~=" not in specifier, requirement
    listed = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert listed == {"3.11", "3.12", "3.13", "3.14"}


def test_an_old_interpreter_is_an_error_that_says_what_to_do(monkeypatch):
    source = ROOT / "src" / "aria" / "__init__.py"
    ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 7))  # else it would be a syntax error
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(ImportError, match=r"needs Python 3\.11 or newer.*python3\.12 -m venv"):
        runpy.run_path(str(source))
