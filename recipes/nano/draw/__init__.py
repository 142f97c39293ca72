"""Planned images -> pixels: batches in PyTorch for training, single images in PIL for evaluation."""
