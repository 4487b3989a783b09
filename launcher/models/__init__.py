"""Models small enough to ship: real architectures, trained to answer the default prompts."""

from pathlib import Path

EMBEDDED = Path(__file__).parent
