"""Inside one process of a run."""
