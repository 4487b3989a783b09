"""A note for engines whose ranks exchange tensors through shared memory if it is available."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.machine.shared_memory import missing_operators

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig


def slow_collectives(config: RunConfig, on_cuda: bool, verb: str) -> list[str]:
    """One note if the CPU ranks of one node cannot `verb` through shared memory; otherwise none."""
    elsewhere = config.backend.python is not None or config.launch.name == "slurm"
    if on_cuda or config.devices == 1 or config.num_nodes > 1 or elsewhere:
        return []
    reason = missing_operators(config.devices)
    if reason is None:
        return []
    return [f"the ranks {verb} over gloo, many times slower than through shared memory: {reason}"]
