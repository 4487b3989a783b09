"""The machine and the operating system around a run: files, processes, terminal, GPUs."""
