"""Compose a configuration from command-line overrides and files."""
