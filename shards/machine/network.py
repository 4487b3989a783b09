"""The network interface through which the ranks of several nodes communicate."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from shards.machine.world import World

VARIABLES = {"cuda": "NCCL_SOCKET_IFNAME", "cpu": "GLOO_SOCKET_IFNAME"}
INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True)
class Network:
    """The interface that a rank uses to other nodes, and its address there; None is not known.

    `infiniband` are the node's adapters over which NCCL sends data, empty if it may not; the interface then only serves
    for connection set-up.
    """

    interface: str | None
    address: str | None
    infiniband: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.interface or 'an unknown interface'} ({self.address or 'no address'})"


def network_of(world: World, environ: Mapping[str, str], kind: str) -> Network:
    """The network of this rank on a device of `kind`: as configured in the environment, otherwise the route to rank
    0."""
    addresses = _addresses()
    if named := environ.get(VARIABLES[kind]):
        if kind != "cuda":  # gloo's variable has an exact name, which NCCL's marks with =
            named = f"={named}"
        interface = named_by(named, list(addresses))
        address = next(iter(addresses.get(interface or "", ())), None)
    else:
        interface, address = _towards(world, addresses)
    may_use = kind == "cuda" and environ.get("NCCL_IB_DISABLE", "0") == "0"
    if may_use and INFINIBAND.is_dir():
        adapters = tuple(sorted(path.name for path in INFINIBAND.iterdir()))
    else:
        adapters = ()
    return Network(interface, address, adapters)


def choose_interface(world: World, environ: MutableMapping[str, str]) -> None:
    """Make gloo and NCCL use the interface towards rank 0, unless the user has configured one.

    By default gloo uses the interface of the host's own name, often the loopback, and NCCL the first one that is up.
    """
    interface, _ = _towards(world, _addresses())
    if interface is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def _addresses() -> dict[str, list[str]]:
    """The addresses of each interface of this machine."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def _towards(world: World, addresses: Mapping[str, list[str]]) -> tuple[str | None, str | None]:
    """The interface towards rank 0, and the address there."""
    address = address_towards(world.master_addr, world.master_port)
    return next((name for name, known in addresses.items() if address in known), None), address


def address_towards(host: str, port: int) -> str | None:
    """The local address used to reach a host; None without a route. Nothing is sent."""
    try:
        for family, kind, protocol, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
    except OSError:
        pass
    return None


def named_by(setting: str, interfaces: list[str]) -> str | None:
    """The first interface that NCCL's setting selects: prefixes, whole names after `=`, all but these after `^`."""
    words = setting.lstrip("^=").split(",")
    is_exact, is_not = "=" in setting[:2], setting.startswith("^")
    for name in interfaces:
        is_named = name in words
        if not is_exact:
            is_named = name.startswith(tuple(words))
        if is_named != is_not:
            return name
    return None
