"""The plan: memory of each device and the speed that the machine allows, before anything starts."""
