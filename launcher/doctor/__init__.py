"""Try each engine on this machine in its own process: `python -m launcher.doctor`."""
