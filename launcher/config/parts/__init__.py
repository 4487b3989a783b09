"""Parts of the schema of a run. Standard library only: a worker needs no Hydra."""
