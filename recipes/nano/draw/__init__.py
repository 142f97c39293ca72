"""Planned pictures -> pixels: batches in PyTorch for training, Pillow for evaluation."""
