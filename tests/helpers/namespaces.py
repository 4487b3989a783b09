"""Two simulated machines on one: two network namespaces, connected by a virtual cable that can be pulled."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """The names, interfaces and addresses of two namespaces: node 0 is 10.77.0.1, node 1 is 10.77.0.2."""

    namespaces: tuple[str, str]
    interfaces: tuple[str, str]
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")

    def command(self, node: int) -> list[str]:
        """The prefix of a command that runs it on a node."""
        return ["ip", "netns", "exec", self.namespaces[node]]

    def pull(self) -> None:
        """Take the link down."""
        _ip("-n", self.namespaces[1], "link", "set", self.interfaces[1], "down")

    def close_ports(self, but: int) -> None:
        """Block all TCP ports of node 0 for node 1 except `but`, as a firewall does."""
        to = ("rule", "add", "to", self.addresses[0], "ipproto", "tcp")
        _ip("-n", self.namespaces[1], *to, "priority", "10", "dport", str(but), "lookup", "main")
        _ip("-n", self.namespaces[1], *to, "priority", "11", "prohibit")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def missing() -> str | None:
    """The reason why namespaces cannot be made here; None if they can."""
    if shutil.which("ip") is None:
        return "no network namespaces: ip is not found (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "no network namespaces: making one needs root"
    name = f"try-{uuid.uuid4().hex[:8]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=20, check=False)
    if tried.returncode:
        return f"no network namespaces: {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


@contextlib.contextmanager
def two_machines() -> Iterator[Pair]:
    """Makes the two namespaces and the cable; removes them on exit."""
    mark = uuid.uuid4().hex[:8]
    pair = Pair((f"a-{mark}", f"b-{mark}"), (f"va{mark}", f"vb{mark}"))
    try:
        for name in pair.namespaces:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        ends = ["link", "add", pair.interfaces[0], "netns", pair.namespaces[0], "type", "veth"]
        _ip(*ends, "peer", "name", pair.interfaces[1], "netns", pair.namespaces[1])
        for name, interface, address in zip(pair.namespaces, pair.interfaces, pair.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")
        yield pair
    finally:
        for name in pair.namespaces:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)
