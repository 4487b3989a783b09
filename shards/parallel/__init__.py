"""Parallel execution of a module that is cut over ranks."""
