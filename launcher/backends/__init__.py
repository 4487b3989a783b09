"""One engine a file. Nothing is imported here: `launcher.backends.base.REGISTRY` names them as strings."""
