"""LitGPT in an environment of its own: `engine` is what the launcher knows of it, `backend` runs in the ranks."""
