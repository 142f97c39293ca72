"""Pages for people say what is there: paths, links, the navigation of the site, and versions."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
WITH_PATHS = (
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/glossary.md",
    *(f"docs/decisions/{n}" for n in ("README.md",)),
)
_BASES = (ROOT, ROOT / "src" / "aria")


def read(page: Path | str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def paths(text: str) -> set[str]:
    """What a page names in code and looks like a path of the repository."""
    spans = re.findall(r"(?<!`)`([\w./*-]+)`(?!`)", text)
    return {span for span in spans if span.endswith("/") or re.search(r"\.(py|md|toml|yml|json|cff)$", span)}


@pytest.mark.parametrize(
    "page", [*WITH_PATHS, *(f"docs/decisions/{p.name}" for p in (ROOT / "docs/decisions").glob("0*.md"))]
)
def test_paths_that_a_page_names_exist(page):
    named = paths(read(page)) - {"config.json", "src/aria/ops/kernels/NAME.py"}
    missing = sorted(path for path in named if not any((base / path).exists() for base in _BASES))
    assert not missing, f"{page} names {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`(?!\])", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^()\s#]+)", text):
        # The reference is generated when the site is built.
        if "://" not in target and not target.startswith(("mailto:", "reference/")):
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_names_every_package():
    text = read("README.md")
    assert len(text.splitlines()) < 120
    tree = text.split("```\nsrc/aria/\n")[1].split("```")[0]
    for package in (ROOT / "src" / "aria").iterdir():
        if package.is_dir() and package.name != "__pycache__":
            assert re.search(rf"\b{package.name}/", tree), f"the tree in README.md lacks {package.name}/"


def test_every_package_has_a_line_in_the_architecture():
    text = read("ARCHITECTURE.md")
    for package in (ROOT / "src" / "aria").iterdir():
        name = f"{package.name}/" if package.is_dir() else package.name
        if not name.startswith("__") and name != "py.typed":
            assert re.search(rf"^\| `{re.escape(name)}` \|", text, re.MULTILINE), f"ARCHITECTURE.md lacks {name}"


def test_the_site_shows_every_page():
    listed = set(re.findall(r"- (?:\w+: )?([\w./-]+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    lie = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert lie <= listed, sorted(lie - listed)


def test_decisions_are_listed():
    index = read("docs/decisions/README.md")
    for record in (ROOT / "docs" / "decisions").glob("0*.md"):
        assert f"]({record.name})" in index
        assert len(record.read_text(encoding="utf-8").splitlines()) < 30


def test_the_citation_has_the_version_of_the_package():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    citation = read("CITATION.cff")
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
    assert "arXiv:2410.05993" in citation


def test_hosted_checks_are_those_of_this_machine():
    steps = re.findall(r"^ +- run: (.*)$", read(".github/workflows/ci.yml"), re.MULTILINE)
    assert steps == [".ci/run"]
    script = read(".ci/run")
    assert all(f"\n{command}\n" in script for command in ("make test", "scripts/check", "make docs"))
    assert "make test" in read("README.md")


def test_hooks_before_commits_need_no_network():
    config = read(".pre-commit-config.yaml")
    assert set(re.findall(r"- repo: (\S+)", config)) == {"local"}
    assert set(re.findall(r"language: (\S+)", config)) == {"system"}


@pytest.mark.parametrize("script", ["scripts/check", ".ci/run"])
def test_scripts_can_be_run(script):
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / script], check=True)
