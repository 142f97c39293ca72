"""Two GPUs over NCCL, and four where there are so many, train as one does. Run with
``make test-gpu``; without two GPUs all of it is skipped."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from aria.train.parallel import Parallel
from tests.helpers.spread import CASES, train
from tests.helpers.torchrun import train_on_ranks

pytestmark = pytest.mark.multi_gpu

RANKS = [ranks for ranks in CASES if ranks <= torch.cuda.device_count()]


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Results of a number of ranks, by case; all cases run on first use."""

    return cache(lambda ranks: train_on_ranks(ranks, tmp_path_factory.mktemp("spread")))


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in RANKS for name in CASES[ranks]])
def test_gpus_train_as_one_does(spread, ranks, name):
    case, several = CASES[ranks][name], spread(ranks)[name]
    alone = train(case, Parallel.start())
    # Sums of float32 in other orders; a router that is near to a tie may then choose another expert.
    tolerance = 2e-2 if case.optimizer.kind == "muon" else 1e-3
    assert several["losses"] == pytest.approx(alone["losses"], rel=tolerance)
    assert several["weights"].keys() == alone["weights"].keys()
    for weight, value in alone["weights"].items():
        assert (several["weights"][weight] - value).abs().max() <= 10 * tolerance, weight
