"""Try each engine on this machine in a process of its own: `python -m launcher.doctor`."""
