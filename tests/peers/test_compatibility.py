"""docs/compatibility.md states what the tests check."""

from __future__ import annotations

from tests.peers import compatibility
from tests.peers.compatibility import CLIENTS, PAGE, PINS


def test_the_page_has_the_tables_of_the_tests():
    page = PAGE.read_text(encoding="utf-8")
    assert page == compatibility.rendered(page), "run python -m tests.peers.compatibility"


def test_every_script_has_a_row():
    shared = {"check.py", "check.mjs"}
    assert {path.name for path in (PINS / "scripts").glob("*.*js")} - shared | {
        path.name for path in (PINS / "scripts").glob("*.py")
    } - shared == {client.script for client in CLIENTS}
