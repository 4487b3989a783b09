"""LitGPT in a separate environment: `engine` has its options for the launcher, `backend` runs in the ranks."""
