"""Start the processes of runs and sweeps, watch them, and end them."""
