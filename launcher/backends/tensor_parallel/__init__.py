"""The project's own tensor parallelism: `engine` has its options for the launcher, `backend` runs in the ranks."""
