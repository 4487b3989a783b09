"""`python -m launcher.doctor`: check which engines work on this machine, each in its own process."""
