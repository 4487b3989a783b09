"""One run: configuration, processes, prompts, the generation loop, measures, the record and its report."""

__version__ = "0.1.0"
