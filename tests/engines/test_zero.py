"""DeepSpeed's ZeRO-Inference, which shards every parameter: the reference's tokens, planned bytes, and refusals."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import pytest
from running import command_line, ranks_of

from launcher.models import EMBEDDED
from launcher.prepare.shapes import built_of
from shards.engines.zero import ZeroPlanner
from shards.machine.hardware import known_device, usual_link
from shards.plan.plan import Plan, make_plan
from shards.plan.request import Offload, PlanRequest


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_are_those_of_the_reference_and_bytes_as_planned(ranks: int, tmp_path: Path) -> None:
    """Also with shards offloaded to main memory, which DeepSpeed's CPU accelerator treats as another device."""
    points = ("tiny_falcon:none", "tiny_llama:none", "tiny_llama:cpu")
    ended = ranks_of("zero_program.py", ranks, str(tmp_path), *points)
    assert ended.code == 0, ended.err[-3000:]
    seen = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    for point in points:
        made = {index: tokens for rank in seen for index, tokens in rank[point]["tokens"].items()}
        assert made == seen[0][point]["reference"]
        assert all(len(rank[point]["tokens"]) < len(made) for rank in seen if ranks > 1)
        assert all(rank[point]["held"] == rank[point]["planned"] for rank in seen)


def plan(model: str, devices: int, offload: Offload | None = None) -> Plan:
    shape = built_of(json.loads((EMBEDDED / model / "config.json").read_text())).shape
    device, link = known_device("a6000"), usual_link("a6000")
    return make_plan(
        PlanRequest(shape=shape, engine=ZeroPlanner(), devices=devices, offload=offload, device=device, link=link)
    )


@pytest.mark.parametrize("model", ["tiny_falcon", "tiny_llama"])
def test_each_rank_has_an_equal_run_of_each_parameter(model: str) -> None:
    shape = built_of(json.loads((EMBEDDED / model / "config.json").read_text())).shape
    runs = sum(2 * ceil(parameter.numel / 3) for parameter in shape.parameters)
    assert [device.parameter_bytes for device in plan(model, 3).devices] == [runs] * 3


def test_the_ceiling_of_offloaded_weights_is_that_of_their_slot() -> None:
    """Every rank copies its own shard; a tied table is copied twice, for the embedding and for the head."""
    made = plan("tiny_falcon", 2, "cpu")
    assert [device.parameter_bytes for device in made.devices] == [0, 0]
    assert made.load_host_bytes is not None
    assert made.load_host_bytes > sum(device.offloaded_bytes for device in made.devices)
    fields = json.loads((EMBEDDED / "tiny_falcon" / "config.json").read_text())
    table = 2 * fields["vocab_size"] * fields["hidden_size"]
    assert made.roofline is not None
    assert made.roofline.work.offloaded_bytes == made.devices[0].offloaded_bytes + table // 2
    alone = plan("tiny_falcon", 1, "cpu").limit
    assert alone is not None
    assert alone.bound == "host"


REFUSALS = {
    "the device is the CPU already. HINT: offload=none": ["offload=cpu"],
    "deepspeed offloads no weights to disk, but to cpu. HINT: offload=cpu": ["offload=disk", "machine=2xa6000"],
    "ZeRO gathers parameters in hooks, which are not compiled. HINT: measure.compile=none": [
        "backend.zero=true", "measure.compile=inductor",
    ],
    "captures kernels of CUDA": ["backend.zero=true", "measure.compile=cudagraph"],
    "backend.max_out_tokens=99 is an option of init_inference": ["backend.zero=true", "backend.max_out_tokens=99"],
    "DeepSpeed has no fp16 on a CPU. HINT: precision=bf16": ["precision=fp16"],
    "deepspeed makes no nf4 weights": ["backend.zero=true", "quantization=nf4"],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_what_it_cannot_do_is_one_line(message: str) -> None:
    ended = command_line("backend=deepspeed", *REFUSALS[message], "dry_run=true")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert message in ended.err


def test_offload_asks_for_it_and_says_so() -> None:
    ended = command_line("backend=deepspeed", "offload=cpu", "machine=1xa6000", "dry_run=true", COLUMNS="200")
    assert ended.code == 0, ended.err
    assert "note: offload=cpu: ZeRO-Inference (backend.zero=true), each rank has prompts of its own" in ended.out
    assert "in main memory, read in each step" in ended.out
