"""Smaller checkpoints from existing ones: pruned or quantized, before any run."""
