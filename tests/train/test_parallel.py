"""Two and four processes over gloo train as one does: shards, experts, sequences, adapters, frozen or lonely parts."""

from __future__ import annotations

from functools import cache

import pytest

from aria.train.parallel import Parallel
from tests.helpers.spread import CASES, train
from tests.helpers.torchrun import train_on_ranks


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Results of a number of ranks, by case; all cases run on first use."""

    return cache(lambda ranks: train_on_ranks(ranks, tmp_path_factory.mktemp("spread")))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases])
def test_ranks_train_as_one_process_does(spread, ranks, name):
    case, several = CASES[ranks][name], spread(ranks)[name]
    alone = train(case, Parallel.start())
    tolerance = 2e-3 if case.optimizer.kind == "muon" else 1e-5
    assert several["losses"] == pytest.approx(alone["losses"], rel=tolerance)
    assert several["norms"] == pytest.approx(alone["norms"], rel=10 * tolerance)
    assert several["losses"][-1] < several["losses"][1]
    assert several["weights"].keys() == alone["weights"].keys()
    for weight, value in alone["weights"].items():
        distance = (several["weights"][weight] - value).abs().max()
        assert distance <= tolerance * value.abs().max().clamp(min=1.0), f"{weight}: {distance:.1e}"
