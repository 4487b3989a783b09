"""Several nodes without a scheduler: the same command for each node, here twice on this machine."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

import pytest
from running import ROOT, Ended, launcher
from slurm_config import free_ports

from launcher.__main__ import main
from launcher.config.values import from_dict
from launcher.launch.nodes import node_command
from launcher.launch.ranks import rank_environment
from launcher.system.files import read_json, read_lines


@pytest.mark.slow
def test_two_nodes_are_one_run(tmp_path: Path) -> None:
    nasty = "model.name='a b$(touch owned)'"
    (tmp_path / "own conf" / "prompts").mkdir(parents=True)
    empty = "path: null\ncount: null\ninput_tokens: null\noutput_tokens: null\n"
    (tmp_path / "own conf" / "prompts" / "three.yaml").write_text(f"name: three\ntexts: [a, b, c]\n{empty}")
    own = ("--config-dir=own conf", "prompts=three")
    address = f"launch.rendezvous=127.0.0.1:{free_ports(1)[0]}"
    common = ("backend=dummy", "num_nodes=2", "devices=1", address, nasty, *own)
    ended: dict[int, Ended] = {}

    def node(rank: int) -> None:
        ended[rank] = launcher(*common, f"launch.node_rank={rank}", cwd=tmp_path, timeout=100)

    threads = [threading.Thread(target=node, args=(rank,)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {rank: done.code for rank, done in ended.items()} == {0: 0, 1: 0}, ended
    assert ended[1].out == ""
    [run_dir] = (tmp_path / "runs").iterdir()
    record = read_json(run_dir / "record.json")
    assert (record["status"], record["num_nodes"], record["world_size"]) == ("ok", 2, 2)
    assert [rank["rank"] for rank in record["ranks"]] == [0, 1]
    assert len(read_lines(run_dir / "completions.jsonl")) == 3
    assert not list(tmp_path.rglob("owned"))


def test_command_of_a_node() -> None:
    names = {"backend": {"name": "fsdp"}, "model": {"name": "m", "path": "m"}, "prompts": {"name": "seed"}}
    launch = {"rendezvous": "[::1]:29400", "node_rank": 1}
    config = from_dict(names | {"launch": launch, "num_nodes": 2, "devices": 4})
    assert node_command(config, ("python", "-m", "launcher", "a=b c", "x='$(y)'")) == (
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=4", "--node-rank=1",
        "--master-addr=::1", "--master-port=29400", "--max-restarts=0", "-m", "launcher", "a=b c", "x='$(y)'",
    )  # fmt: skip


def test_environment_of_ranks() -> None:
    every = {"PYTHONPATH": f"{ROOT}:/a", "TOKENIZERS_PARALLELISM": "false"}
    hidden = rank_environment({"PYTHONPATH": ":/a", "OMP_NUM_THREADS": "3"}, 2, on_cuda=False)
    assert hidden == every | {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}
    shared = rank_environment({"PYTHONPATH": "/a", "CUDA_VISIBLE_DEVICES": "1"}, 10**6, on_cuda=True)
    assert shared == every | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "1"}
    alone = rank_environment({"PYTHONPATH": "/a"}, 1, on_cuda=True)
    assert alone == every | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["num_nodes=2"],
            "num_nodes=2, and this command starts ranks on one node. "
            f"HINT: launch.rendezvous={socket.gethostname()}:29400 launch.node_rank=0 here and 1, ... on the others, "
            "without -m; or launch=slurm",
        ),
        (
            ["num_nodes=2", "launch.rendezvous=node1"],
            "launch.rendezvous=node1 is not HOST:PORT. HINT: launch.rendezvous=node1:29400",
        ),
        (
            ["num_nodes=2", "launch.rendezvous=node1:29400"],
            "launch.node_rank=None is not one of num_nodes=2. "
            "HINT: launch.node_rank=0 on the first node to 1 on the last",
        ),
        (
            ["launch.rendezvous=node1:29400", "launch.node_rank=1"],
            "launch.node_rank=1 is not one of num_nodes=1. HINT: num_nodes=2",
        ),
        (
            ["num_nodes=2", "launch.rendezvous=node1:29400", "launch.node_rank=1", "backend.python=/venv/bin/python"],
            "launch.rendezvous starts launchers, but backend.python=/venv/bin/python applies to ranks only. "
            "HINT: /venv/bin/python -m launcher ..., without backend.python",
        ),
    ],
)
def test_what_does_not_say_how_to_start_this_node(
    overrides: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["backend=dummy", *overrides]) == 2
    assert capsys.readouterr() == ("", message + "\n")
    assert list(tmp_path.iterdir()) == []
