"""Check and plan a run before any of its processes starts."""
