"""Private names of PyTorch and torchao stand in one file, so that an upgrade has one place to check."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "aria"
ALLOWED = "private_api.py"
LIBRARIES = ("torch", "torchao")
OF_MODULES = ("_parameters", "_modules", "_buffers")
"""Private attributes of every ``nn.Module``."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def faults(source: str) -> list[str]:
    """``line: name`` of each private name that a file uses."""
    found, ours = [], set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        for full, bound in names:
            library, *parts = full.split(".")
            if library in LIBRARIES:
                ours.add(bound)
                if library == "torchao" or any(map(private, parts)):
                    found.append(f"{node.lineno}: {full}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if node.attr in OF_MODULES or (isinstance(root, ast.Name) and root.id in ours):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_private_names_stand_in_one_file():
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).as_posix() != ALLOWED]
    assert len(files) > 100, "the package has moved"
    found = [
        f"{file.relative_to(PACKAGE).as_posix()}:{fault}"
        for file in files
        for fault in faults(file.read_text(encoding="utf-8"))
    ]
    assert not found, f"move these to {ALLOWED}, with the version and the reason:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._foreach_add_(a, b)",
        "import torch\ntorch.ops.aten._scaled_dot_product_cudnn_attention(q)",
        "import torch.utils._pytree as pytree",
        "from torch.distributed.checkpoint.filesystem import _StorageInfo",
        "from torch._dynamo import config",
        "import torchao.optim",
        "module._parameters['weight']",
    ],
)
def test_private_names_are_found(source):
    assert len(faults(source)) == 1


def test_other_names_pass():
    assert faults("import torch\ntorch.__version__\nself._own\nout._replace(a=1)\ntorch.add(a, b)") == []
