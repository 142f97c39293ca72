"""The stages of nano's training."""
