"""Sharding of a model over devices: shapes, bytes, checkpoints, ranks. Does not depend on the launcher."""
