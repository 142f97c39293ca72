"""Code that new users copy from README and the quick start runs as it is, with what the package itself installs."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from aria.hub import NANO

ROOT = Path(__file__).parents[2]
BLOCKS = [
    (page, code)
    for page in ("README.md", "docs/quickstart.md")
    for code in re.findall(
        r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
]


def test_both_pages_have_code():
    assert [page for page, _ in BLOCKS] == ["README.md", "docs/quickstart.md"]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_code_runs(page, code, monkeypatch, capsys):
    names = {"pillow": "PIL"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.split(r"[^\w-]", line)[0].lower() for line in project["dependencies"]}
    installed = {names.get(name, name.replace("-", "_")) for name in installed} | {"aria"}
    for node in ast.walk(ast.parse(code)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.split(".")[0] in installed, f"the block imports {module}, which the package does not install"
    monkeypatch.chdir(ROOT)
    exec(compile(code.replace('"rhymes-ai/Aria"', repr(str(NANO))), page, "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()
