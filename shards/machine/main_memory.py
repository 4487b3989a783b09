"""Main memory of this machine, as reported by the kernel. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path


def available_bytes() -> int:
    """Memory available to new processes without swapping (MemAvailable)."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    if match:
        return int(match.group(1)) * 1024
    return 0
