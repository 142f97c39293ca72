"""Loading straight onto the GPU: every layout, as stored and converted, gives what the CPU gets."""

from __future__ import annotations

import pytest
import torch

from aria.checkpoint import load, load_model
from tests.helpers.published import LAYOUTS, write_layout
from tests.helpers.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_on_the_gpu_are_those_of_the_file(layout, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_CHUNK", 5000)
    config = tiny_config()
    state = tiny_model(config).bfloat16().state_dict()
    write_layout(layout, state, config, tmp_path, shards=2)
    loaded = load_model(tmp_path, dtype=dtype, device="cuda").state_dict()
    for name, expected in state.items():
        assert loaded[name].is_cuda and torch.equal(loaded[name].cpu(), expected.to(dtype)), name


def test_a_large_load_takes_no_memory_beside_the_weights(tmp_path):
    config = tiny_config(vocab_size=2_000_000)
    state = tiny_model(config).bfloat16().state_dict()
    write_layout("paddle", state, config, tmp_path)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = load_model(tmp_path, dtype=torch.bfloat16, device="cuda")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert torch.cuda.memory_reserved() - before < weights + (64 << 20)
    name = "language_model.lm_head.weight"
    assert torch.equal(model.state_dict()[name].cpu(), state[name])
