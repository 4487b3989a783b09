"""Several machines without a scheduler: the same command on each of them, joined by torch's elastic launcher.

The rendezvous is static: `launch.node_rank` says which node is which, so that the first node has rank 0 and prints the
report. A dynamic one would give the ranks in the order of arrival, and nobody joins later here.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.config import RunConfig

ADDRESS = re.compile(r"(?P<host>[^\s:/]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


def check_one_node(config: RunConfig) -> None:
    """ConfigError for a run on several nodes, where this process can start ranks on its own only."""
    if config.launch.name == "local" and config.num_nodes > 1:
        raise ConfigError(
            f"num_nodes={config.num_nodes}, and this command starts ranks on one node.",
            "launch=slurm, or without -m on each node launch.rendezvous=FIRST_HOST:29400 launch.node_rank=0 (1, ...)",
        )


def check_nodes(config: RunConfig) -> None:
    """ConfigError where `launch.rendezvous` and `launch.node_rank` do not say which of the nodes this is."""
    launch, nodes = config.launch, config.num_nodes
    if ADDRESS.fullmatch(launch.rendezvous or "") is None:
        raise ConfigError(f"launch.rendezvous={launch.rendezvous} is not HOST:PORT.", "launch.rendezvous=node1:29400")
    if launch.node_rank is None or not 0 <= launch.node_rank < nodes:
        raise ConfigError(
            f"launch.node_rank={launch.node_rank} is not one of num_nodes={nodes}.",
            f"0 on the first node to {nodes - 1} on the last" if nodes > 1 else "num_nodes=2 or more",
        )


def node_command(config: RunConfig, overrides: Sequence[str]) -> tuple[str, ...]:
    """What starts the ranks of this node; each of them composes `overrides` again, and rank 0 makes the directory."""
    found = ADDRESS.fullmatch(config.launch.rendezvous or "")
    assert found is not None, "check_nodes comes first"
    return (
        config.backend.python or sys.executable, "-m", "torch.distributed.run", f"--nnodes={config.num_nodes}",
        f"--nproc-per-node={config.devices}", f"--node-rank={config.launch.node_rank}",
        f"--master-addr={found['host'].strip('[]')}", f"--master-port={found['port']}", "--max-restarts=0",
        "-m", "launcher", *overrides,
    )  # fmt: skip


def node_environment(environ: Mapping[str, str], config: RunConfig, on_cuda: bool) -> dict[str, str]:
    """The environment of the ranks of this node."""
    path = [str(Path(__file__).resolve().parents[1]), *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = str(max(len(os.sched_getaffinity(0)) // config.devices, 1))
    own = {"OMP_NUM_THREADS": threads, **environ, "PYTHONPATH": os.pathsep.join(path)}
    return own if on_cuda else own | {"CUDA_VISIBLE_DEVICES": ""}


def become_node(config: RunConfig, overrides: Sequence[str], on_cuda: bool) -> None:
    """This process becomes the one that starts the ranks of this node: signals and exit code are its own."""
    command = node_command(config, overrides)
    sys.stdout.flush()
    os.execve(command[0], command, node_environment(os.environ, config, on_cuda))
