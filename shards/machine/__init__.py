"""The machine: devices, links, measured rates, and the ranks of a run."""
