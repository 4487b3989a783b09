"""Smaller checkpoints made of a checkpoint: pruned, or quantized, before any run."""
