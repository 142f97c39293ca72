"""Experts with adapters of many requests, by kernels in Triton's interpreter and in PyTorch, against a formula."""

from __future__ import annotations

import pytest
import torch

from aria import ops
from aria.ops import LowRank, stacked
from aria.ops.kernels import stacked as kernels
from tests.helpers import interpreter  # noqa: F401  before any kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("implementation", [kernels, stacked], ids=["kernels", "plain"])
@pytest.mark.parametrize("adapted", [(True, True), (True, False), (False, True)], ids=["both", "fc1", "fc2"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_each_token_has_the_adapters_of_its_owner(implementation, adapted, tokens):
    torch.manual_seed(tokens)
    E, A, D, width, ranks = 5, 2, 24, 40, (3, 8, 2)
    x, weights = torch.randn(tokens, D), torch.rand(tokens, A)
    fc1, fc2 = torch.randn(E, D, 2 * width) * 0.2, torch.randn(E, width, D) * 0.2
    # Experts of any order in memory: inference has each output's weights together.
    fc1 = fc1.mT.contiguous().mT
    index = torch.stack([torch.randperm(E - 1)[:A] for _ in range(tokens)])  # the last expert has no token
    owners = torch.randint(0, 4, (tokens,), dtype=torch.int32)
    changes = [
        [LowRank(torch.randn(E, size, R) * 0.3, torch.randn(E, R, out) * 0.3, 0.5 + R) for R in ranks]
        for size, out in ((D, 2 * width), (width, D))
    ]
    stacks = tuple(
        ops.stack_adapters([(owner, 0, change) for owner, change in enumerate(some, 1)], weight.shape[2], weight)
        if wanted
        else None
        for wanted, some, weight in zip(adapted, changes, (fc1, fc2), strict=True)
    )
    got = implementation.stacked_expert_mlp(x, fc1, fc2, weights, index, stacks, owners)

    def product(x, weight, some, wanted, expert, owner):
        y = x @ weight[expert].double()
        if owner and wanted:
            a, b, scaling, _ = some[owner - 1]
            y = y + x @ a[expert].double() @ b[expert].double() * scaling
        return y

    for t in range(tokens):
        expected = torch.zeros(D, dtype=torch.float64)
        for choice, expert in enumerate(index[t].tolist()):
            owner = int(owners[t])
            hidden = ops.swiglu(product(x[t].double(), fc1, changes[0], adapted[0], expert, owner))
            y = product(hidden, fc2, changes[1], adapted[1], expert, owner)
            expected += y * weights[t, choice].double()
        assert (got[t] - expected).norm() < 1e-5 * expected.norm()


def test_kernels_leave_many_ranks_to_grouped_products():
    weight = torch.zeros(2, 16, 16)
    for rank, fits in ((64, True), (65, False)):
        change = LowRank(torch.zeros(2, 16, rank), torch.zeros(2, rank, 16), 1.0)
        stack = ops.stack_adapters([(1, 0, change)], 16, weight)
        assert kernels.fits((None, stack)) == fits
