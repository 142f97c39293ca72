"""States of all global random number generators: Python, NumPy, PyTorch on CPU and CUDA."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_WORDS = 624
"""State words of the Mersenne Twister."""


def random_states() -> dict[str, Any]:
    """States of all global generators; for CUDA, that of the current device."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),  # checkpoints hold no NumPy arrays
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Restore what :func:`random_states` returned; generators that ``states`` lacks stay as they are."""
    if "python" in states:
        random.setstate(states["python"])
    if "numpy" in states:
        _, keys, position, *_ = states["numpy"]
        # NumPy would read memory beyond its state.
        if len(keys) != _WORDS or not 0 <= position <= _WORDS:
            raise ValueError(f"the state of NumPy's generator is at {position} of {len(keys)}")
        np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Restore every global generator at the end of the ``with`` block."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)
