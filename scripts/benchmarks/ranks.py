"""Starting the ranks of a benchmark, and the order in which contestants take turns. Standard library only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


def free_port() -> int:
    """A port of this machine that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def alternating(contestants: Sequence[T], number: int) -> Sequence[T]:
    """The contestants in the order of round `number`: reversed in rounds with an even number."""
    if number % 2:
        return contestants
    return contestants[::-1]


def run_ranks(command: Sequence[str], ranks: int, threads: int, limit_s: float) -> list[dict[str, Any]]:
    """Run the ranks of one world; returns their rows, which each rank prints as its last line. All processes are ended
    before this returns."""
    world = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    children = [
        subprocess.Popen(
            command, env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [child.communicate(timeout=limit_s)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [row for output in outputs for row in json.loads(output.splitlines()[-1])]
