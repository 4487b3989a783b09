"""One command splits a causal language model over devices, runs prompts through it, and measures speed and memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from launcher.version import __version__

if TYPE_CHECKING:
    from launcher.api import UserError, compose, load_record, make_plan, run, sweep

__all__ = ["UserError", "__version__", "compose", "load_record", "make_plan", "run", "sweep"]


def __getattr__(name: str) -> Any:
    """The functions of `launcher.api`, which is imported at the first access."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("launcher.api"), name)
