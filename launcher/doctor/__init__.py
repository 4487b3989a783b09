"""Which engines work on this machine, tried one by one, each in a process of its own: `python -m launcher.doctor`."""
