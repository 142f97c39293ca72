"""Held-out evaluation, and publication of a trained model."""
