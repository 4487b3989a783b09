"""Two machines (network namespaces) with a cable between them: the interface that is used, and errors without it."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import Pair, missing, two_machines
from running import Ended, run

from launcher.__main__ import main
from launcher.system.files import read_json
from shards.machine.network import Network, choose_interface, named_by, network_of
from shards.machine.world import World

PORT = 29400
HERE = World(rank=1, world_size=2, num_nodes=2, master_addr="127.0.0.1")


@pytest.fixture
def machines() -> Iterator[Pair]:
    if reason := missing():
        pytest.skip(reason)
    with two_machines() as pair:
        yield pair


def run_on_both(machines: Pair, out: Path, hang_timeout_s: float) -> tuple[dict[int, Ended], float]:
    """Run the same command on both nodes; returns the results, and the seconds of the slower one."""
    words = ("backend=dummy", "num_nodes=2", "devices=1", "measure.repeats=1", f"hang_timeout_s={hang_timeout_s:g}")
    ended: dict[int, Ended] = {}

    def node(number: int) -> None:
        place = (f"launch.rendezvous={machines.addresses[0]}:{PORT}", f"launch.node_rank={number}")
        command = [*machines.command(number), sys.executable, "-m", "launcher", *words, *place, f"output_dir={out}"]
        ended[number] = run(command, timeout=200)

    began = time.monotonic()
    threads = [threading.Thread(target=node, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 2
    return ended, time.monotonic() - began


@pytest.mark.slow
def test_the_record_says_by_which_interface_the_nodes_were_joined(machines: Pair, tmp_path: Path) -> None:
    ended, _ = run_on_both(machines, tmp_path, 600)
    assert {number: done.code for number, done in ended.items()} == {0: 0, 1: 0}, ended
    [run_dir] = tmp_path.iterdir()
    found = [rank["network"] for rank in read_json(run_dir / "record.json")["ranks"]]
    assert [(one["interface"], one["address"]) for one in found] == list(
        zip(machines.interfaces, machines.addresses, strict=True)
    )


@pytest.mark.slow
def test_nodes_that_cannot_reach_each_other_say_so_with_address_and_interface(machines: Pair, tmp_path: Path) -> None:
    machines.pull()
    ended, _ = run_on_both(machines, tmp_path, 5)
    assert [ended[number].code for number in (0, 1)] == [2, 2]
    address = rf"{re.escape(machines.addresses[0])}:{PORT}"
    listens = rf"node 0 listens there on {machines.interfaces[0]} \({re.escape(machines.addresses[0])}\)"
    assert re.fullmatch(
        rf"Nodes 1 of 2 did not connect to {address} within 4\.5 s; {listens}\. HINT: .+\n", ended[0].err
    )
    reached = (
        rf"Node 1 did not reach all nodes through {address} from an unknown interface \(no address\) within 4\.5 s"
    )
    assert re.fullmatch(rf"{reached}: .*unreachable\. HINT: .+\n", ended[1].err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_that_only_find_each_other_end_with_address_and_interface(machines: Pair, tmp_path: Path) -> None:
    machines.close_ports(but=PORT)
    ended, _ = run_on_both(machines, tmp_path, 12)
    for number in (0, 1):
        network = rf"{machines.interfaces[number]} \({re.escape(machines.addresses[number])}\)"
        line = rf"^Rank {number} over {network} could not connect to all others: .+ HINT: let the nodes reach .+$"
        assert re.search(line, ended[number].err, re.MULTILINE), ended[number].err
        assert ended[number].code == 1  # the exit code of torchrun
    assert list(tmp_path.iterdir()) == []


def test_the_interface_is_the_one_towards_rank_0_or_the_one_that_is_named() -> None:
    for kind in ("cpu", "cuda"):
        assert network_of(HERE, {}, kind).interface == "lo"
        assert network_of(HERE, {}, kind).address == "127.0.0.1"
    assert network_of(HERE, {"NCCL_SOCKET_IFNAME": "^lo"}, "cpu").interface == "lo"
    assert network_of(HERE, {"NCCL_SOCKET_IFNAME": "^lo"}, "cuda").interface != "lo"
    assert network_of(HERE, {"GLOO_SOCKET_IFNAME": "nowhere"}, "cpu") == Network(None, None)
    environ = {"NCCL_SOCKET_IFNAME": "ib0"}
    choose_interface(HERE, environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"}
    nobody = World(rank=1, world_size=2, num_nodes=2, master_addr="no-such-host.invalid")
    choose_interface(nobody, empty := {})
    assert empty == {}


def test_infiniband_is_said_where_nccl_may_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.machine.network.INFINIBAND", tmp_path)
    for name in ("mlx5_1", "mlx5_0"):
        (tmp_path / name).mkdir()
    assert network_of(HERE, {}, "cuda").infiniband == ("mlx5_0", "mlx5_1")
    assert network_of(HERE, {"NCCL_IB_DISABLE": "1"}, "cuda").infiniband == ()
    assert network_of(HERE, {}, "cpu").infiniband == ()


@pytest.mark.parametrize(
    ("setting", "interface"),
    [("eth", "eth0"), ("=eth", None), ("=eth1", "eth1"), ("ib,eth1", "ib0"), ("^eth,lo", "ib0"), ("^=eth0,lo", "ib0")],
)
def test_interfaces_are_named_as_nccl_reads_them(setting: str, interface: str | None) -> None:
    assert named_by(setting, ["lo", "ib0", "eth0", "eth1"]) == interface


def test_nccl_says_nothing_where_it_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend=dummy", "accelerator=cpu", "launch.nccl_debug=true"]) == 2
    assert capsys.readouterr().err == (
        "launch.nccl_debug=true, and without GPUs no rank uses NCCL. HINT: launch.nccl_debug=false\n"
    )


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        words = ("backend=dummy", "num_nodes=2", f"launch.rendezvous=127.0.0.1:{port}", "launch.node_rank=0")
        assert main(list(words)) == 2
    assert re.fullmatch(rf"Node 0 cannot listen on port {port}: .*in use.* HINT: .+\n", capsys.readouterr().err)
