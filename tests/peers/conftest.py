"""What the checks against transformers stand on; helpers are those of ``tests/cpu``."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_model, transformers_twin

from aria import AriaForConditionalGeneration

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A tiny random Aria, and transformers' own loaded from what ours saved."""
    ours = AriaForConditionalGeneration(tiny_model(tiny_config())).eval()
    folder = tmp_path_factory.mktemp("pair")
    ours.save_pretrained(folder)
    return ours, transformers_twin(folder)
