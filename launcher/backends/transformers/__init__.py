"""Plain transformers: `engine` has its options for the launcher, `backend` runs in the rank."""
