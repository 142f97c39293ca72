"""The sampling kernels against their PyTorch references, through Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

pytest.importorskip("triton")

from aria.engine import SamplingParams
from aria.engine.sampler import SamplerState
from aria.ops import reference, sampling
from aria.ops.kernels import sample as kernels
from tests.helpers import interpreter  # noqa: F401  (fixes Triton's for current NumPy)

BANNED = (9, 40)
SETTINGS = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.6, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1e-38},
    {"temperature": 1.0, "top_k": 10**9, "top_p": 1.0},
)


def rows_of(settings, vocabulary: int) -> tuple[SamplerState, torch.Tensor]:
    state = SamplerState(len(settings) + 2, vocabulary, torch.device("cpu"), BANNED)
    # Rows in another order than in the batch, and one that pads it.
    rows = torch.arange(len(settings), -1, -1, dtype=torch.int32)
    for n, params in enumerate(settings):
        state.set_row(int(rows[n]), SamplingParams(**params), 2**62 + n, [])
    return state, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [41, 2500])
def test_draws_equal_the_reference(vocabulary, dtype):
    state, rows = rows_of(SETTINGS, vocabulary)
    for scale in (1, 4):
        # Rows are slices of a wider tensor, like a graph's logits.
        wide = torch.randn(len(rows), vocabulary + 7) * scale
        logits = wide.to(dtype)[:, :vocabulary]
        positions = torch.randint(0, 70000, (len(rows),), dtype=torch.int32)
        arguments = (logits, rows, positions, state._table, state._banned)
        drawn = kernels.sample_triton(*arguments, state._arrivals)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == reference.sample(*arguments).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "programs"), [(torch.float32, 1), (torch.bfloat16, 1024)])
def test_the_lowest_logit_kept_equals_that_of_sorting(dtype, programs, monkeypatch):
    torch.manual_seed(0)
    V, settings = 3000, [
        {"temperature": float(t), "top_k": int(k), "top_p": float(p), "min_p": float(m)}
        for t, k, p, m in zip(
            torch.rand(16) * 1.9 + 0.1,
            torch.randint(2, 3200, (16,)) * torch.randint(0, 2, (16,)),
            torch.where(torch.rand(16) < 0.3, 1.0, torch.rand(16) * 0.98 + 0.01),
            torch.where(torch.rand(16) < 0.7, 0.0, torch.rand(16) * 0.2),
            strict=True,
        )
    ]  # fmt: skip
    state, rows = rows_of(settings, V)
    logits = (torch.randn(len(rows), V) * torch.rand(len(rows), 1) * 8).to(dtype)
    # Ties, both zeros, logits that cannot be drawn, and outliers.
    logits[:, 100:200] = logits[:, :100]
    logits[:, 300:303] = torch.tensor([0.0, -0.0, float("-inf")]).to(dtype)
    logits[5, 7], logits[6, 7], logits[7] = 3e4, -3e4, 1.0
    N = len(rows)
    # With this capacity some rows find their bound among the gathered scores, and others must search further.
    for name, value in (("BLOCK", 512), ("PEAKS", 256), ("CAPACITY", 512), ("LIKELIEST", 100), ("SEARCHING", programs)):
        monkeypatch.setattr(kernels, name, value)
    thresholds, counts = kernels.thresholds(logits, rows, state._table, state._banned, state._arrivals)
    assert counts[:, 2].tolist() == [0] * N
    assert not state._arrivals.any()
    scores = logits.float().index_fill(1, state._banned, float("-inf"))[:-1]
    expected = sampling.thresholds(scores, sampling.Settings.of(state._table[rows[:-1]]))
    for n in range(N - 1):
        kept, right = scores[n] >= thresholds[n], scores[n] >= expected[n]
        assert kept.equal(right), (settings[n], int(kept.sum()), int(right.sum()))
    assert thresholds[N - 1] == float("-inf")


def test_launches_use_the_counters_of_their_sampler():
    """Programs of another sampler that runs at the same time must not be counted."""
    state, rows = rows_of([{"temperature": 1.0, "top_p": 0.9}] * 2, 2500)
    other, _ = rows_of([{"temperature": 1.0}] * 2, 2500)
    assert state._arrivals.data_ptr() != other._arrivals.data_ptr()
    other._arrivals.fill_(1)  # as if another stream were drawing
    arguments = (torch.randn(3, 2500), rows, rows, state._table, state._banned)
    assert kernels.sample_triton(*arguments, state._arrivals).tolist() == reference.sample(*arguments).tolist()
    assert other._arrivals.eq(1).all() and not state._arrivals.any()


@pytest.mark.slow
def test_a_row_is_drawn_equally_in_every_batch():
    V = 5000
    state, rows = rows_of(SETTINGS[:6], V)
    logits, positions = torch.randn(7, V), torch.arange(7, dtype=torch.int32)
    together = kernels.sample_triton(logits, rows, positions, state._table, state._banned)
    for n in range(7):
        alone = kernels.sample_triton(
            logits[n : n + 1], rows[n : n + 1], positions[n : n + 1], state._table, state._banned
        )
        assert alone[0] == together[n]


def test_ties_go_to_the_lowest_id_and_rows_of_nan_stay_in_range():
    V = 4500
    state, rows = rows_of([{}, {}, {"temperature": 1.0, "top_p": 0.9}], V)
    logits = torch.full((4, V), -1.0)
    logits[0, [4400, 2500, 3000]] = 5.0
    logits[1] = float("-inf")
    logits[2] = float("-inf")
    logits[2, 4444] = -7.0
    drawn = kernels.sample_triton(logits, rows, rows, state._table, state._banned).tolist()
    assert drawn[0] == 2500
    assert 0 <= drawn[1] < V
    assert drawn[2] == 4444
    assert drawn[3] == 0
