"""The HTML page of runs and sweeps: its sections with figures, and the document around them."""
