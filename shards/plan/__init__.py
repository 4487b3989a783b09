"""What each device will hold and the speed that its machine allows, before anything starts."""
