"""Rules that keep the code readable, beside those about imports, words and pages."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "aria"
LONGEST_FUNCTION = 105
LONG_FUNCTION = 60
MOST_LONG_FUNCTIONS = 20
"""Functions of the package over `LONG_FUNCTION` lines; the number only becomes smaller."""
CLASSES_THAT_STAND_TWICE = {
    "Batch", "Completion", "Conversation", "Decoder", "Encoder", "ImagePart", "Job", "JsonLines",
    "MediaFile", "Metrics", "Order", "Output", "OutputText", "Page", "Part", "Piece",
    "Plan", "Reader", "Rule", "Saved", "Status", "Stream", "Tally", "Text",
    "TokenLogprob", "Turn", "Usage", "VideoPart", "Work", "_Array", "_DType", "_Vocabulary",
}  # fmt: skip
"""Names that are still to become unique; the list only becomes shorter."""
FOR_RECIPES_ALONE = frozenset({"next_token_labels"})
"""Names of the package that only recipes use and that are still to move there; the list only becomes shorter."""


@cache
def trees(folder: str) -> dict[str, ast.Module]:
    """Parsed files of a folder, by their path in the repository."""
    return {
        file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


def test_a_class_name_stands_once():
    names = Counter(
        node.name for tree in trees("src/aria").values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    twice = {name for name, count in names.items() if count > 1}
    assert twice <= CLASSES_THAT_STAND_TWICE, sorted(twice - CLASSES_THAT_STAND_TWICE)


def test_functions_are_short():
    lengths = {}
    for where, tree in trees("src/aria").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{where}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    longest = {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert not longest, longest
    long = [name for name, length in lengths.items() if length > LONG_FUNCTION]
    assert len(long) <= MOST_LONG_FUNCTIONS, "\n".join(long)


def used(tree: ast.AST) -> Iterator[str]:
    """Names that code refers to: variables, attributes, imports, and names in strings of annotations."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.name.rpartition(".")[2] for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value)


def test_nothing_in_the_package_is_for_recipes_alone():
    inside = Counter(name for tree in trees("src/aria").values() for name in used(tree))
    outside = Counter(
        name for folder in ("bench", "examples", "docs") for t in trees(folder).values() for name in used(t)
    )
    recipes = {name for tree in trees("recipes").values() for name in used(tree)}
    alone = set()
    for where, tree in trees("src/aria").items():
        if where.endswith("__init__.py"):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = node.name
                if name in recipes and not inside[name] and name not in outside:
                    alone.add(name)
    assert alone <= FOR_RECIPES_ALONE, sorted(alone - FOR_RECIPES_ALONE)
