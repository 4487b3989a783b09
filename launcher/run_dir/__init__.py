"""The files of a run on disk, written and read."""
