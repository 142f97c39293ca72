"""Experts with several adapters, by kernels in Triton's interpreter and in PyTorch, against a formula."""

from __future__ import annotations

import pytest
import torch

from aria import ops
from aria.ops import ExpertWeights, LoRA, MoEAdapters, reference
from aria.ops.kernels import multi_lora_prefill as kernels
from aria.ops.moe import multi_lora_expert_mlp_sorted
from tests.helpers import interpreter  # noqa: F401  before any kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(
    "implementation",
    [kernels.multi_lora_expert_mlp_prefill, multi_lora_expert_mlp_sorted, reference.multi_lora_expert_mlp],
    ids=["kernels", "plain", "reference"],
)
@pytest.mark.parametrize("adapted", [(True, True), (True, False), (False, True)], ids=["both", "fc1", "fc2"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_each_token_uses_its_own_adapter(implementation, adapted, tokens):
    torch.manual_seed(tokens)
    E, A, D, width, ranks = 5, 2, 24, 40, (3, 8, 2)
    x, weights = torch.randn(tokens, D), torch.rand(tokens, A)
    fc1, fc2 = torch.randn(E, D, 2 * width) * 0.2, torch.randn(E, width, D) * 0.2
    # Experts in different memory orders: inference has [E, out, in].
    fc1 = fc1.mT.contiguous().mT
    index = torch.stack([torch.randperm(E - 1)[:A] for _ in range(tokens)])  # the last expert has no token
    adapter_ids = torch.randint(0, 4, (tokens,), dtype=torch.int32)
    changes = [
        [LoRA(torch.randn(E, size, R) * 0.3, torch.randn(E, R, out) * 0.3, 0.5 + R) for R in ranks]
        for size, out in ((D, 2 * width), (width, D))
    ]
    loras = tuple(
        ops.stack_loras([(adapter_id, 0, change) for adapter_id, change in enumerate(some, 1)], weight.shape[2], weight)
        if wanted
        else None
        for wanted, some, weight in zip(adapted, changes, (fc1, fc2), strict=True)
    )
    got = implementation(x, ExpertWeights(fc1, fc2), weights, index, MoEAdapters(adapter_ids, *loras))

    def product(x, weight, some, wanted, expert, adapter_id):
        y = x @ weight[expert].double()
        if adapter_id and wanted:
            a, b, scaling, _ = some[adapter_id - 1]
            y = y + x @ a[expert].double() @ b[expert].double() * scaling
        return y

    for t in range(tokens):
        expected = torch.zeros(D, dtype=torch.float64)
        for choice, expert in enumerate(index[t].tolist()):
            adapter_id = int(adapter_ids[t])
            hidden = ops.swiglu(product(x[t].double(), fc1, changes[0], adapted[0], expert, adapter_id))
            y = product(hidden, fc2, changes[1], adapted[1], expert, adapter_id)
            expected += y * weights[t, choice].double()
        assert (got[t] - expected).norm() < 1e-5 * expected.norm()


def test_kernels_leave_many_ranks_to_grouped_products():
    x, weight = torch.zeros(1, 16), torch.zeros(2, 16, 16)
    experts = ExpertWeights(weight, weight)
    for rank, fits in ((64, True), (65, False)):
        change = LoRA(torch.zeros(2, 16, rank), torch.zeros(2, rank, 16), 1.0)
        stack = ops.stack_loras([(1, 0, change)], 16, weight)
        assert kernels.fits(x, experts, x, x, MoEAdapters(torch.zeros(1), None, stack)) == fits
