"""Runs on several machines without a scheduler: each node runs the same command, and torchrun connects their ranks.

The rendezvous is static: `launch.node_rank` numbers the nodes, so that the first node has rank 0 and prints the report.
A dynamic rendezvous would assign ranks in order of arrival; its support for nodes that join later is not needed.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from launcher.config.schema import ConfigError
from launcher.launch.ranks import rank_environment
from shards.errors import WorldError
from shards.machine.network import Network, network_of
from shards.machine.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.config.schema import RunConfig

ELSEWHERE = "start all nodes with the same command and their own launch.node_rank=, and let them reach each other"
ADDRESS = re.compile(r"(?P<host>[^\s:/]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


def check_one_node(config: RunConfig) -> None:
    """ConfigError for a run on several nodes, if this process can start ranks on its own node only."""
    if config.launch.name == "local" and config.num_nodes > 1:
        raise ConfigError(
            f"num_nodes={config.num_nodes}, and this command starts ranks on one node.",
            f"launch.rendezvous={socket.gethostname()}:29400 launch.node_rank=0 here and 1, ... on the others, "
            "without -m; or launch=slurm",
        )


def check_nodes(config: RunConfig) -> None:
    """ConfigError for an invalid `launch.rendezvous` or `launch.node_rank`, and for `backend.python`.

    The ranks started here run the whole launcher, so the engine's interpreter, which may have only the packages of a
    rank, is not enough.
    """
    launch, nodes = config.launch, config.num_nodes
    if ADDRESS.fullmatch(launch.rendezvous or "") is None:
        host = (launch.rendezvous or "").partition(":")[0] or socket.gethostname()
        raise ConfigError(f"launch.rendezvous={launch.rendezvous} is not HOST:PORT.", f"launch.rendezvous={host}:29400")
    if launch.node_rank is None or not 0 <= launch.node_rank < nodes:
        hint = "num_nodes=2"
        if nodes > 1:
            hint = f"launch.node_rank=0 on the first node to {nodes - 1} on the last"
        raise ConfigError(f"launch.node_rank={launch.node_rank} is not one of num_nodes={nodes}.", hint)
    if (python := config.backend.python) is not None:
        raise ConfigError(
            f"launch.rendezvous starts launchers, but backend.python={python} applies to ranks only.",
            f"{python} -m launcher ..., without backend.python",
        )


def node_command(config: RunConfig, command: Sequence[str]) -> tuple[str, ...]:
    """The torchrun command that starts the ranks of this node; each rank runs `command`."""
    address = ADDRESS.fullmatch(config.launch.rendezvous or "")
    assert address is not None, "check_nodes comes first"
    return (
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={config.num_nodes}",
        f"--nproc-per-node={config.devices}", f"--node-rank={config.launch.node_rank}",
        f"--master-addr={address['host'].strip('[]')}", f"--master-port={address['port']}", "--max-restarts=0",
        *command[1:],
    )  # fmt: skip


def become_node(config: RunConfig, command: Sequence[str], on_cuda: bool) -> NoReturn:
    """Wait for the other nodes, then replace this process by torchrun, which starts the ranks of this node.

    Signals and the exit code are then torchrun's. WorldError if the nodes do not connect in time.
    """
    meet(config)
    words = node_command(config, command)
    if sys.stdout is not None:
        sys.stdout.flush()
    os.execve(words[0], words, rank_environment(os.environ, config.devices, on_cuda))


def meet(config: RunConfig) -> None:
    """Wait until all nodes have connected to the rendezvous; WorldError names the missing ones.

    torchrun itself would report neither the missing node nor the address.
    """
    address = ADDRESS.fullmatch(config.launch.rendezvous or "")
    assert address is not None, "check_nodes comes first"
    host, port = address["host"].strip("[]"), int(address["port"])
    deadline = time.monotonic() + config.join_s
    if config.launch.node_rank == 0:
        _receive(host, port, config.num_nodes, deadline, config.join_s)
    else:
        _come(host, port, config, deadline)


def _receive(host: str, port: int, num_nodes: int, deadline: float, limit_s: float) -> None:
    """Wait for every other node, then release all of them."""
    came: dict[int, socket.socket] = {}
    try:
        family, both = socket.AF_INET, socket.has_dualstack_ipv6()
        if both:
            family = socket.AF_INET6
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
            while len(came) < num_nodes - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                node = stack.enter_context(server.accept()[0])
                node.settimeout(max(deadline - time.monotonic(), 0.001))
                told = node.recv(16).decode(errors="replace")
                if told.isdecimal() and 0 < int(told) < num_nodes:
                    came[int(told)] = node
            for node in came.values():
                node.sendall(b"go")
    except TimeoutError:
        missing = ", ".join(str(number) for number in range(1, num_nodes) if number not in came)
        fact = f"Nodes {missing} of {num_nodes} did not connect to {host}:{port} within {limit_s:g} s"
        raise WorldError(f"{fact}; node 0 listens there on {here(host, port)}.", ELSEWHERE) from None
    except OSError as error:
        other_port = 29400
        if port < 65535:
            other_port = port + 1
        raise WorldError(
            f"Node 0 cannot listen on port {port}: {error.strerror}.",
            f"launch.rendezvous={host}:{other_port} on all nodes",
        ) from None


def _come(host: str, port: int, config: RunConfig, deadline: float) -> None:
    """Connect to node 0 as soon as it listens, and wait for all other nodes."""
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 5.0)) as connection:
                connection.sendall(str(config.launch.node_rank).encode())
                connection.settimeout(left)
                if connection.recv(2) == b"go":
                    return
        except OSError as error:
            reason = f": {error}"
        time.sleep(0.2)
    raise WorldError(
        f"Node {config.launch.node_rank} did not reach all nodes through {host}:{port} from {here(host, port)} within "
        f"{config.join_s:g} s{reason}.",
        ELSEWHERE,
    )


def here(host: str, port: int) -> Network:
    """The network interface and address of this node on the route to `host`."""
    return network_of(World(master_addr=host, master_port=port), {}, "cpu")
