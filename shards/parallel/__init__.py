"""How a module is cut over ranks."""
