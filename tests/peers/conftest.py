"""Fixtures of the comparisons with transformers."""

from __future__ import annotations

import pytest
import torch

from aria import AriaForConditionalGeneration
from tests.helpers.tiny import tiny_config, tiny_model, transformers_twin

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A tiny random Aria, and transformers' Aria loaded from its checkpoint."""
    ours = AriaForConditionalGeneration(tiny_model(tiny_config())).eval()
    folder = tmp_path_factory.mktemp("pair")
    ours.save_pretrained(folder)
    return ours, transformers_twin(folder)
