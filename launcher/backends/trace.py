"""A trace by torch's profiler, as a file that Chrome and Perfetto open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from pathlib import Path


class Tracer:
    """Traces this process and its device from its creation until `stop`."""

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def stop(self) -> None:
        """End the trace."""
        self._profile.stop()

    def write(self, path: Path) -> None:
        """Write the trace as JSON, atomically."""
        temporary = path.with_name(f".{path.name}.part")
        self._profile.export_chrome_trace(str(temporary))
        temporary.replace(path)
