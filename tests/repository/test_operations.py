"""Every public operation is declared once: its name and parameters are those of a function of ``ops/reference.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "aria"
REFERENCE, OPERATIONS = "ops/reference.py", "ops/operations.py"
MOST_PARAMETERS = 6
"""With more, arguments that travel together become one object, see ``ops/weights.py``."""


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    """Functions of a module, not those inside classes and functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return (node for node in tree.body if isinstance(node, ast.FunctionDef))


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *([arguments.vararg] if arguments.vararg else [])]
    return [argument.arg for argument in (*named, *arguments.kwonlyargs)]


def operations(package: Path) -> dict[str, str]:
    """Public operations, and the functions that they are made from: ``name = Operation(reference.function)``."""
    found = {}
    for node in ast.parse((package / OPERATIONS).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            call, [target] = node.value, node.targets
            if isinstance(call.func, ast.Name) and call.func.id == "Operation" and isinstance(target, ast.Name):
                found[target.id] = ast.unparse(call.args[0])
    return found


def faults(package: Path) -> list[str]:
    declared = {function.name: function for function in functions(package / REFERENCE)}
    names, found = operations(package), []
    for name, made_from in names.items():
        if made_from != f"reference.{name}" or name not in declared:
            found.append(f"{OPERATIONS}: {name} is made from {made_from}, not from a function of this name")
        elif len(parameters(declared[name])) > MOST_PARAMETERS:
            found.append(f"{REFERENCE}: {name} has more than {MOST_PARAMETERS} parameters")
    for file in sorted(package.rglob("*.py")):
        where = file.relative_to(package).as_posix()
        if where != REFERENCE:
            found += [f"{where}: defines {one.name} again" for one in functions(file) if one.name in names]
    return found


def test_every_operation_is_declared_once():
    assert len(operations(PACKAGE)) > 20, "operations are declared elsewhere"
    assert not (found := faults(PACKAGE)), "\n".join(found)


def test_what_is_declared_twice_is_found(tmp_path):
    (tmp_path / "ops" / "kernels").mkdir(parents=True)
    (tmp_path / REFERENCE).write_text("def add(x, y): ...\ndef wide(a, b, c, d, e, f, g): ...\n")
    (tmp_path / OPERATIONS).write_text(
        "add = Operation(reference.add)\nwide = Operation(reference.wide)\nodd = Operation(reference.add)\n"
    )
    (tmp_path / "ops" / "kernels" / "fast.py").write_text("def add(x, y): ...\ndef add_triton(x, y): ...\n")
    assert faults(tmp_path) == [
        "ops/reference.py: wide has more than 6 parameters",
        "ops/operations.py: odd is made from reference.add, not from a function of this name",
        "ops/kernels/fast.py: defines add again",
    ]
