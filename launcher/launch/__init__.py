"""Start, watch and end the processes of runs and sweeps."""
