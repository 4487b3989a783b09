"""The machine: devices, links, measured rates, and the ranks that take part."""
