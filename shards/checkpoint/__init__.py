"""Files of weights on disk: where they are, what is in them, and whether that is whole."""
