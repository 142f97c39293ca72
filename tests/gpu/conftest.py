"""What one test leaves on the GPU, the next one shall not find: some of them weigh the memory that is free."""

from __future__ import annotations

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _gives_memory_back():
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
