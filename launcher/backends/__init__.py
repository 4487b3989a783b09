"""One engine a file. Nothing is imported here: `launcher.backend.REGISTRY` names them as strings."""
