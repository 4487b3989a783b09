"""How a model is cut up and put on devices: shapes, bytes, checkpoints, ranks. Knows nothing of runs."""
