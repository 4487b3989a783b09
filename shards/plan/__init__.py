"""The plan: memory of each device, and the speed that the hardware allows, before anything starts."""
