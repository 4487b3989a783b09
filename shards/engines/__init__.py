"""One planner for each engine: how it cuts a model, what it reserves and refuses. Used by `shards.plan`; no torch."""
