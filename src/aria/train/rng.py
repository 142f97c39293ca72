"""States of the random number generators that a training may draw from: Python, NumPy, PyTorch on CPU and CUDA."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_WORDS = 624
"""Of the Mersenne twister."""


def random_states() -> dict[str, Any]:
    """States of all global generators; of CUDA's, that of the current device."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),  # as checkpoints have it, which hold no arrays
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set all global generators to what :func:`random_states` gave; ones that ``states`` lacks stay as they are."""
    if "python" in states:
        random.setstate(states["python"])
    if "numpy" in states:
        _, keys, position, *_ = states["numpy"]
        # NumPy would read what lies behind its numbers in memory.
        if len(keys) != _WORDS or not 0 <= position <= _WORDS:
            raise ValueError(f"the state of NumPy's random numbers is at {position} of {len(keys)}")
        np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """What is drawn inside leaves every global generator as it was before."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)
