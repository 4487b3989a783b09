"""Composition of a configuration from command-line words and files."""
