"""One file for each engine: how it cuts a model, what it reserves and refuses, as `shards.plan` asks it. No torch."""
