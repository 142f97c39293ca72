"""Names in the package: a class name is defined once, and nothing exists for ``recipes/`` alone."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import aria

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "aria"


def parsed(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    """Path relative to the folder, and syntax tree, of each Python file."""
    for file in sorted(folder.rglob("*.py")):
        yield file.relative_to(folder).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def duplicate_classes(folder: Path) -> dict[str, set[str]]:
    """Class names that are defined in more than one file, with the files."""
    files: dict[str, set[str]] = defaultdict(set)
    for path, tree in parsed(folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                files[node.name].add(path)
    return {name: paths for name, paths in files.items() if len(paths) > 1}


def references(tree: ast.AST) -> set[str]:
    """All names that are read, imported or accessed as attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= {node.name.rpartition(".")[2]}
    return found


def used_by_recipes_alone(package: Path, recipes: Path, public: set[str]) -> list[str]:
    """Public functions and classes of a package that only the recipes refer to, as ``file: name``."""
    trees = list(parsed(package))
    used = set().union(*(references(tree) for _, tree in trees)) | public
    by_recipes = set().union(*(references(tree) for _, tree in parsed(recipes)))
    return [
        f"{path}: {node.name}"
        for path, tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and node.name not in used
        and node.name in by_recipes
    ]


def test_a_class_name_is_defined_once():
    found = [f"{name} in {' and '.join(sorted(files))}" for name, files in duplicate_classes(PACKAGE).items()]
    assert not found, "defined more than once: " + ", ".join(found)


def test_nothing_is_used_by_recipes_alone():
    pages = " ".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    public = {*aria.__all__, *re.findall(r"\w+", pages)}
    found = used_by_recipes_alone(PACKAGE, ROOT / "recipes", public)
    assert not found, "move to recipes/: " + ", ".join(found)


@pytest.mark.parametrize("own", ["def helper(): ...", "def helper(): ...\nhelper()"])
def test_broken_rules_are_found(tmp_path, own):
    package, recipes = tmp_path / "aria", tmp_path / "recipes"
    for folder in (package, recipes):
        folder.mkdir()
    (package / "one.py").write_text(f"class Twice: ...\n{own}")
    (package / "two.py").write_text("class Twice: ...\nclass Once: ...")
    (recipes / "train.py").write_text("from aria.one import helper\nhelper()")
    assert duplicate_classes(package) == {"Twice": {"one.py", "two.py"}}
    expected = [] if "\n" in own else ["one.py: helper"]
    assert used_by_recipes_alone(package, recipes, set()) == expected
    assert not used_by_recipes_alone(package, recipes, {"helper"})
