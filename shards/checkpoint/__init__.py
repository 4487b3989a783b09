"""Weight files on disk: where they are, what they contain, and whether they are complete."""
