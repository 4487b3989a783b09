"""Runs as jobs of a SLURM cluster: the batch script, the job and its end, job arrays for sweeps."""
