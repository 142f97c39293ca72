"""Nobody reaches through another object's engine: `Engine` and `AsyncEngine` offer what their callers need."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERNAL = {"core", "scheduler", "runner"}
"""Attributes of engines that only ``aria.engine`` reads from."""
EXEMPT = ("src/aria/engine", "tests/helpers/tiny_core.py")
"""The engine itself, and what its own tests share."""
CHECKED = ("src/aria", "bench", "recipes", "examples", "docs", "tests/helpers")


def chains(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each attribute chain that goes through an engine's internals."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Attribute):
            continue
        inner = node.value
        own = isinstance(inner.value, ast.Name) and inner.value.id == "self"
        twice = (inner.attr, node.attr) in {("engine", "engine"), ("engine", "core")}
        if twice or (inner.attr in INTERNAL and not own):
            yield node.lineno, ast.unparse(node)


def test_chains_are_found():
    found = chains(ast.parse("a.engine.core; a.engine.engine.b; x.core.pool; x().runner.launch; self.core.step"))
    assert {text for _, text in found} == {"a.engine.core", "a.engine.engine", "x.core.pool", "x().runner.launch"}
    assert not list(
        chains(ast.parse("engine.core; engine.max_batch; core.step(); self.scheduler.pool; a.engine.model"))
    )


def test_nobody_reaches_through_an_engine():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {chain}"
        for folder in CHECKED
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not any(file.is_relative_to(ROOT / path) for path in EXEMPT)
        for line, chain in chains(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found, "give Engine or AsyncEngine a property or method for this:\n" + "\n".join(found)
