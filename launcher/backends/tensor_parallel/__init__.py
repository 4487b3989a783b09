"""The project's own tensor parallelism: `engine` is what the launcher knows of it, `backend` runs in the ranks."""
