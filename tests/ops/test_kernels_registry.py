"""Kernels register with operations, and take exactly the arguments of the references."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from aria import ops
from aria.ops.registry import KERNELS, Operation, Where
from tests.helpers import interpreter  # noqa: F401  before any kernel

pytest.importorskip("triton")

OPERATIONS = {name: value for name, value in vars(ops).items() if isinstance(value, Operation)}


def test_every_kernel_module_registers_an_implementation():
    registered = set()
    for operation in OPERATIONS.values():
        for where in (Where.TRAINING, Where.INFERENCE):
            registered |= {one.run.__module__ for one in operation._gather(where)}
    wanted = {f"aria.ops.kernels.{name}" for name in KERNELS} - {"aria.ops.kernels.vision_attention"}
    assert wanted <= registered


@pytest.mark.parametrize("name", OPERATIONS)
def test_implementations_have_the_parameters_of_the_reference(name):
    operation = OPERATIONS[name]
    expected = [(p.name, p.kind, p.default) for p in inspect.signature(operation).parameters.values()]
    assert len(expected) <= 6, "more arguments than that travel better as one object (aria.ops.weights)"
    for where in (Where.TRAINING, Where.INFERENCE):
        for one in operation._gather(where):
            found = [(p.name, p.kind, p.default) for p in inspect.signature(one.run).parameters.values()]
            assert found == expected, f"{one.run.__module__}.{one.run.__name__}"


def test_no_module_is_missing_from_the_list():
    helpers = {"grouped_gemm", "pdl", "shared_memory"}
    folder = importlib.import_module("aria.ops.kernels").__path__[0]
    names = {file.stem for file in Path(folder).glob("*.py")} - {"__init__"}
    assert names == helpers | set(KERNELS)
