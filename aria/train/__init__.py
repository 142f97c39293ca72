"""Training: losses, fixed-shape packing, budgets; the loop and its recipes are in modules of their own."""

from aria.train.loss import (
    IGNORE_INDEX,
    CrossEntropy,
    RouterLosses,
    linear_cross_entropy,
    next_token_labels,
    router_losses,
)
from aria.train.packing import BoundedSegments, FixedPatches, TrainingContext, bounded_segments, fixed_patches
from aria.train.prefetch import prefetch
from aria.train.schedule import Budget, StepBudget, TimeBudget

__all__ = [
    "IGNORE_INDEX",
    "BoundedSegments",
    "Budget",
    "CrossEntropy",
    "FixedPatches",
    "RouterLosses",
    "StepBudget",
    "TimeBudget",
    "TrainingContext",
    "bounded_segments",
    "fixed_patches",
    "linear_cross_entropy",
    "next_token_labels",
    "prefetch",
    "router_losses",
]
