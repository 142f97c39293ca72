"""Rules about imports: one direction, at the top of files. And files and functions are of a readable length."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FACE = "__init__"
"""``src/aria/__init__.py``, which exports what the components below it offer."""
LAYERS = (
    ("__main__",),
    ("cli",),
    (FACE,),
    ("serve",),
    ("pretrained", "inspection", "jobs"),
    ("engine", "train"),
    ("checkpoint", "processor"),
    ("model",),
    ("ops",),
    ("config",),
    ("media", "templates", "grammars"),
    ("workers", "hub", "settings", "wording", "private_api"),
    ("json_walk", "lazy"),
)
"""Modules and packages in `src/aria/`, from the top layer down. Each imports from lower layers and from itself."""
LONGEST_FILE = 600
LONGEST_FUNCTION, LONG_FUNCTION = 110, 60
MOST_LONG_FUNCTIONS = 19
"""Functions of the package over `LONG_FUNCTION` lines; the number only becomes smaller."""

_LAYER = {component: layer for layer, components in enumerate(LAYERS) for component in components}


def component_of(file: Path, package: Path) -> str:
    return file.relative_to(package).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def components_imported(node: ast.Import | ast.ImportFrom, file: Path, package: Path) -> Iterator[str]:
    """Components of the package that an import statement reaches; nothing for other packages."""
    if isinstance(node, ast.Import):
        targets = [alias.name for alias in node.names]
    else:
        module = node.module or ""
        if node.level:
            above = file.relative_to(package.parent).parts[: -node.level]
            module = ".".join([*above, module]).strip(".")
        # `from aria import ops` names a component, `from aria import Engine` what the face exports.
        targets = [f"{module}.{alias.name}" if module == package.name else module for alias in node.names]
    for target in targets:
        name, *rest = target.split(".")
        if name == package.name:
            component = rest[0] if rest else FACE
            yield component if (package / component).is_dir() or (package / f"{component}.py").is_file() else FACE


def faults(package: Path) -> list[str]:
    """One line for each broken rule about imports in a package's files."""
    found = []
    for file in sorted(package.rglob("*.py")):
        component, where = component_of(file, package), file.relative_to(package).as_posix()
        if component not in _LAYER:
            found.append(f"{where}: add the component {component!r} to a layer of LAYERS")
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in imports(tree):
            for other in components_imported(node, file, package):
                # A component without a layer is reported where it stands.
                if other != component and _LAYER.get(other, len(LAYERS)) <= _LAYER[component]:
                    kind = "beside" if _LAYER[other] == _LAYER[component] else "above"
                    found.append(f"{where}:{node.lineno}: {component} imports {other}, which is {kind}")
        if component != "cli":
            lines = sorted(local_imports(tree, file, package))
            found += [f"{where}:{line}: import inside a function" for line in lines]
    return found


def local_imports(tree: ast.AST, file: Path, package: Path) -> set[int]:
    """Lines of the imports of the package's own modules that stand inside functions."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    inside = (node for function in functions for node in imports(function))
    return {node.lineno for node in inside if any(components_imported(node, file, package))}


@pytest.mark.slow
def test_components_import_only_downward():
    assert not (found := faults(ROOT / "src" / "aria")), "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("ops/moe.py", "from aria.model import Aria", "ops imports model, which is above"),
        ("engine/loop.py", "import aria.train.loss", "engine imports train, which is beside"),
        ("engine/loop.py", "from ..train import loss", "engine imports train, which is beside"),
        ("checkpoint/load.py", "from aria import processor", "checkpoint imports processor, which is beside"),
        ("model/aria.py", "from aria import Engine", "model imports __init__, which is above"),
        ("train/trainer.py", "import aria", "train imports __init__, which is above"),
        ("__init__.py", "from aria.cli import app", "__init__ imports cli, which is above"),
        ("engine/loop.py", "def f():\n    from aria import ops", "engine/loop.py:2: import inside a function"),
        ("attic/old.py", "import torch", "add the component 'attic' to a layer"),
    ],
)
def test_broken_rules_are_found(tmp_path, file, source, expected):
    package = tmp_path / "aria"
    for component in ("cli", "config"):
        _write(package / f"{component}.py", "")
    for component in ("ops", "model", "engine", "train", "checkpoint", "processor"):
        _write(package / component / "__init__.py", "from aria.config import AriaConfig\nimport torch")
    _write(package / "cli.py", "def chat():\n    from aria.engine import Engine")
    assert faults(package) == []
    _write(package / file, source)
    found = faults(package)
    assert len(found) == 1
    assert expected in found[0]


def _write(file: Path, source: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")


@pytest.mark.slow
def test_files_are_short_and_say_what_they_are():
    folders = (ROOT / name for name in ("src", "recipes", "bench", "examples", "tests"))
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    assert len(files) > 40, "the folders have moved"
    for file in files:
        source, where = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
        lines = len(source.splitlines())
        assert lines <= LONGEST_FILE, f"{where} has {lines} lines; {LONGEST_FILE} is the most"
        assert ast.get_docstring(ast.parse(source)), f"{where} should start by saying what it is for"


def test_functions_are_short():
    lengths = {}
    for file in sorted((ROOT / "src" / "aria").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lengths[f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    assert not (longest := {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION}), longest
    long = [name for name, lines in lengths.items() if lines > LONG_FUNCTION]
    assert len(long) <= MOST_LONG_FUNCTIONS, "\n".join(long)


# --- recipes/nano and tests -------------------------------------------------------------------------------------------

NANO = "recipes.nano"
NANO_LAYERS = ("assets", "text", "scenes", "draw", "train", "eval")
"""Folders of recipes/nano from the bottom up. A module imports from its own folder and from those below."""


def module_imports(root: Path, package: str) -> dict[str, set[str]]:
    """Return what each module of ``package`` imports from it, imports for type checking included.

    Args:
        root: Folder of the top-level package's folder.
        package: Dotted name, such as ``recipes.nano``.
    """
    folder = root.joinpath(*package.split("."))
    files = {".".join(file.relative_to(root).with_suffix("").parts): file for file in sorted(folder.rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        targets = set()
        for node in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            else:
                assert not node.level, f"{module}: import by the full name"
                targets |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        found[module] = targets & files.keys() - {module}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import one another in a circle, the first again at the end; empty if there is no circle."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := search(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := search(module, []))), [])


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Return imports of nano's modules that go up its layers."""
    level = {module: NANO_LAYERS.index(module.split(".")[2]) for module in graph if module.count(".") > 2}
    return [f"{a} imports {b}" for a in level for b in sorted(graph[a]) if level.get(b, 0) > level[a]]


def test_nano_imports_only_downward_and_without_circles():
    graph = module_imports(ROOT, NANO)
    assert len(graph) > 30, "recipes/nano has moved"
    assert not (found := upward(graph)), "\n".join(found)
    assert not (found := circle(graph)), " -> ".join(found)


def test_upward_imports_and_circles_are_found():
    graph = {"recipes.nano.text.a": {"recipes.nano.draw.b"}, "recipes.nano.draw.b": set()}
    assert upward(graph) == ["recipes.nano.text.a imports recipes.nano.draw.b"]
    assert circle(graph) == []
    graph["recipes.nano.draw.b"].add("recipes.nano.text.a")
    assert circle(graph) == ["recipes.nano.text.a", "recipes.nano.draw.b", "recipes.nano.text.a"]


def test_test_modules_do_not_import_from_test_modules():
    """What several of them share is in ``tests/helpers``."""
    graph = module_imports(ROOT, "tests")
    assert len(graph) > 90, "tests have moved"
    tests = {module for module in graph if module.rpartition(".")[2].startswith("test_")}
    found = [f"{module} imports {other}" for module in graph for other in sorted(graph[module] & tests)]
    assert not found, "\n".join(found)
