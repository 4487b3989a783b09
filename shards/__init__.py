"""Sharding of a model over devices: shapes, bytes, checkpoints, ranks. Knows nothing of runs."""
