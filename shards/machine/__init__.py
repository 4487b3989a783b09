"""What the model is put on: devices, links, measured rates, and the ranks that take part."""
