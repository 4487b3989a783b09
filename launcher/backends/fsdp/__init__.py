"""FSDP2 through Lightning Fabric: `engine` has its options for the launcher, `backend` runs in the ranks."""
