"""Several machines without a scheduler: the same command on each of them, joined by torch's elastic launcher.

The rendezvous is static: `launch.node_rank` says which node is which, so that the first node has rank 0 and prints the
report. A dynamic one would give the ranks in the order of arrival, and nobody joins later here.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, NoReturn

from launcher.config.schema import ConfigError
from launcher.launch.local import rank_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.config.schema import RunConfig

ADDRESS = re.compile(r"(?P<host>[^\s:/]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


def check_one_node(config: RunConfig) -> None:
    """ConfigError for a run on several nodes, where this process can start ranks on its own only."""
    if config.launch.name == "local" and config.num_nodes > 1:
        raise ConfigError(
            f"num_nodes={config.num_nodes}, and this command starts ranks on one node.",
            "launch=slurm, or without -m on each node launch.rendezvous=FIRST_HOST:29400 launch.node_rank=0 (1, ...)",
        )


def check_nodes(config: RunConfig) -> None:
    """ConfigError where `launch.rendezvous` and `launch.node_rank` do not say which of the nodes this is.

    Also for another interpreter: these ranks compose and report, which takes more than the packages of a rank.
    """
    launch, nodes = config.launch, config.num_nodes
    if ADDRESS.fullmatch(launch.rendezvous or "") is None:
        raise ConfigError(f"launch.rendezvous={launch.rendezvous} is not HOST:PORT.", "launch.rendezvous=node1:29400")
    if launch.node_rank is None or not 0 <= launch.node_rank < nodes:
        raise ConfigError(
            f"launch.node_rank={launch.node_rank} is not one of num_nodes={nodes}.",
            f"0 on the first node to {nodes - 1} on the last" if nodes > 1 else "num_nodes=2 or more",
        )
    if (python := config.backend.python) is not None:
        raise ConfigError(
            f"launch.rendezvous starts whole launchers, and backend.python={python} is for ranks alone.",
            f"{python} -m launcher ..., without backend.python",
        )


def node_command(config: RunConfig, command: Sequence[str]) -> tuple[str, ...]:
    """The command that starts the ranks of this node, each of which is `command` again; rank 0 makes the directory."""
    address = ADDRESS.fullmatch(config.launch.rendezvous or "")
    assert address is not None, "check_nodes comes first"
    return (
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={config.num_nodes}",
        f"--nproc-per-node={config.devices}", f"--node-rank={config.launch.node_rank}",
        f"--master-addr={address['host'].strip('[]')}", f"--master-port={address['port']}", "--max-restarts=0",
        *command[1:],
    )  # fmt: skip


def become_node(config: RunConfig, command: Sequence[str], on_cuda: bool) -> NoReturn:
    """This process becomes the one that starts the ranks of this node: signals and exit code are its own."""
    words = node_command(config, command)
    if sys.stdout is not None:
        sys.stdout.flush()
    os.execve(words[0], words, rank_environment(os.environ, config.devices, on_cuda))
