"""The page of runs and sweeps: sections with figures, and the document that holds them."""
