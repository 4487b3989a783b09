"""Checks and plans before a process starts."""
