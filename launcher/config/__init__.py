"""The configuration: the schema of a run, its checks and its error messages."""
