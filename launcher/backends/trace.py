"""A trace of torch's profiler as a file that Chrome and Perfetto open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from pathlib import Path


class Tracer:
    """Begins to trace when it is made; what this process and its device do until `write` is in the file."""

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def stop(self) -> None:
        """No more is traced."""
        self._profile.stop()

    def write(self, path: Path) -> None:
        """Write the trace as JSON, whole or not at all."""
        temporary = path.with_name(f".{path.name}.part")
        self._profile.export_chrome_trace(str(temporary))
        temporary.replace(path)
