"""FSDP2 through Lightning Fabric: `engine` is what the launcher knows of it, `backend` runs in the ranks."""
