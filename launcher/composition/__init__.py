"""From what a user writes, on the command line and in files, to a configuration."""
