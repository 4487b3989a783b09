"""The figures of a run, computed from what its ranks measured."""
