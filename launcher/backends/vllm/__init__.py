"""vLLM: `engine` is what the launcher knows of it, `backend` runs in the rank that holds it."""
