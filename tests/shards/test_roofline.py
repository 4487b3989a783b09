"""Ceilings compared with published and calculated figures: tokens/s over all devices, 512 tokens of context, bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shards.machine.hardware import DEVICES, LINKS, Device, Link, known_device
from shards.plan.roofline import Limit, Machine, Scheme, Work, decode_step, prefill

FALCON = Work(
    step_bytes=82_606_587_904,
    step_parameters=41_303_293_952,
    layer_parameters=40_770_600_960,
    kv_bytes_per_token=122_880,
    num_layers=60,
    hidden_size=8192,
    gathered_bytes=82_606_587_904,
    all_reduces=60,
)
LLAMA = Work(
    step_bytes=64_631_902_208,
    step_parameters=32_315_951_104,
    layer_parameters=32_102_953_984,
    kv_bytes_per_token=1_597_440,
    num_layers=60,
    hidden_size=6656,
    gathered_bytes=64_631_902_208,
    all_reduces=120,
)
A6000 = Machine(DEVICES["a6000"], 2, LINKS["pcie4"])
BRIDGE = Machine(DEVICES["a6000"], 2, LINKS["nvlink_bridge"])
A100 = Machine(DEVICES["a100_80g"], 2, LINKS["nvlink3"])
H200 = Machine(DEVICES["h200"])


@pytest.mark.parametrize(
    ("work", "machine", "scheme", "expected"),
    [
        (FALCON, A6000, "split", ("18.0", "142", "550")),
        (FALCON, A6000, "gathered", ("1.21", "9.7", "38.7")),
        (FALCON, BRIDGE, "split", ("18.2", "144", "562")),
        (FALCON, BRIDGE, "gathered", ("2.42", "19.4", "77.5")),
        (FALCON, A100, "split", ("47.9", "381", "1489")),
        (FALCON, H200, "single", ("52.0", "414", "1626")),
        (FALCON, H200, "gathered", ("17.3", "139", "551")),
        (LLAMA, A6000, "split", ("21.6", "159", "494")),
        (LLAMA, A6000, "gathered", ("1.55", "12.4", "49.5")),
        (LLAMA, A100, "split", ("57.9", "428", "1351")),
        (LLAMA, H200, "single", ("65.7", "483", "1515")),
        (LLAMA, H200, "gathered", ("22.1", "172", "625")),
    ],
)
def test_decode(work: Work, machine: Machine, scheme: Scheme, expected: tuple[str, ...]) -> None:
    assert as_printed(work, machine, scheme, expected, context=512) == expected


@pytest.mark.parametrize(("work", "expected"), [(FALCON, ("9.9", "79.0", "316")), (LLAMA, ("12.6", "101", "404"))])
def test_decode_of_fsdp_bound_by_its_copies(work: Work, expected: tuple[str, ...]) -> None:
    """Gathering over NVLink is faster than copying in and out of the buffers; these figures omit the KV cache."""
    assert as_printed(work, A100, "gathered", expected, context=0) == expected


def as_printed(work: Work, machine: Machine, scheme: Scheme, like: tuple[str, ...], context: int) -> tuple[str, ...]:
    """Tokens/s for batches of 1, 8 and 32, with the number of digits of `like`."""
    limits = [decode_step(work, machine, scheme, batch=batch, context=context) for batch in (1, 8, 32)]
    digits = [len(text.partition(".")[2]) for text in like]
    return tuple(f"{limit.tokens_per_s:.{d}f}" for limit, d in zip(limits, digits, strict=True) if limit)


def test_falcon_40b_on_two_a6000_reaches_the_published_0_60_tokens_for_one_prompt() -> None:
    """Both ranks answer the same prompt, so each step gives one token."""
    limit = decode_step(FALCON, A6000, "gathered", batch=1, context=512)
    assert limit is not None
    assert f"{1 / limit.seconds:.2f}" == "0.61"
    assert limit.bound == "link"


@pytest.mark.parametrize(
    ("work", "machine", "scheme", "milliseconds"),
    [
        (FALCON, A6000, "split", 136),
        (FALCON, A100, "split", 67),
        (FALCON, H200, "single", 53),
        (LLAMA, A6000, "split", 107),
        (LLAMA, A100, "split", 53),
        (LLAMA, H200, "single", 42),
    ],
)
def test_prefill_of_512_tokens(work: Work, machine: Machine, scheme: Scheme, milliseconds: int) -> None:
    """Without the time of the all-reduces, which the figures omit."""
    free = Machine(machine.device, machine.num_devices, Link("free", float("inf"), 0.0))
    limit = prefill(work, free, scheme, batch=1, tokens=512)
    assert limit is not None
    assert (round(limit.seconds * 1e3), limit.bound) == (milliseconds, "compute")


@pytest.mark.parametrize(
    ("bandwidth", "flops", "link", "expected"),
    [
        (1e12, 1e18, 1e15, Limit(0.03, "memory", 2 / 0.03)),
        (1e18, 1e12, 1e15, Limit(0.02, "compute", 100.0)),
        (1e18, 1e18, 1e12, Limit(0.003, "link", 2 / 0.003)),
    ],
)
def test_the_slowest_of_three_bounds_a_gathering_step(
    bandwidth: float, flops: float, link: float, expected: Limit
) -> None:
    work = Work(
        step_bytes=6_000_000_000,
        step_parameters=10_000_000_000,
        layer_parameters=1,
        kv_bytes_per_token=0,
        num_layers=1,
        hidden_size=1,
        gathered_bytes=6_000_000_000,
    )
    device = Device("card", bandwidth=bandwidth, flops_16=flops)
    found = decode_step(work, Machine(device, 2, Link("link", link, 0.0)), "gathered", batch=1, context=1)
    assert found == expected


@pytest.mark.parametrize(("over", "seconds"), [(0, 0.009), (2, 0.012)])
def test_gathering_in_place_costs_each_rank_a_copy_of_its_part(over: int, seconds: float) -> None:
    """Of 6 GB, each of four ranks (of two) reads and writes a quarter (a half), then reads all; no link is used."""
    work = replace(
        FALCON,
        step_bytes=6_000_000_000,
        step_parameters=1,
        kv_bytes_per_token=0,
        gathered_bytes=6_000_000_000,
        gathered_over=over,
        gathered_in_place=True,
    )
    machine = Machine(Device("card", bandwidth=1e12, flops_16=1e18), 4, Link("link", 1.0, 1.0))
    assert decode_step(work, machine, "gathered", batch=1, context=1) == Limit(seconds, "memory", 4 / seconds)


def test_every_collective_costs_its_latency_and_its_bytes() -> None:
    """Three all-reduces of 2 x 8 numbers (prefill: 20 x 8) over four devices, and a gather of 2 x 100 logits."""
    work = Work(
        step_bytes=1,
        step_parameters=1,
        layer_parameters=1,
        kv_bytes_per_token=0,
        num_layers=1,
        hidden_size=8,
        all_reduces=3,
        gathered_logits=100,
    )
    machine = Machine(Device("card", bandwidth=1e30, flops_16=1e30), 4, Link("link", 100.0, 1.0))
    decode = decode_step(work, machine, "split", batch=2, context=1)
    filled = prefill(work, machine, "split", batch=2, tokens=10)
    assert decode is not None
    assert filled is not None
    assert decode.seconds == pytest.approx(3 * (1 + 0.48) + 1 + 3)
    assert filled.seconds == pytest.approx(3 * (1 + 4.8) + 1 + 3)


@pytest.mark.parametrize(
    "machine",
    [Machine(DEVICES["cpu"]), Machine(DEVICES["a6000"], 2), Machine(Device("no rate of its own", bandwidth=1e12))],
)
def test_no_limit_is_given_where_a_rate_is_not_known(machine: Machine) -> None:
    assert decode_step(FALCON, machine, "split", batch=1, context=1) is None
    assert prefill(FALCON, machine, "split", batch=1, tokens=1) is None


@pytest.mark.parametrize("scheme", ["single", "gathered"])
def test_what_lies_in_main_memory_comes_through_the_slot(scheme: Scheme) -> None:
    """Half of 82.6 GB over PCIe 4.0 at 25 GB/s for each of two GPUs, for any batch; a CPU needs no such copy."""
    work = replace(FALCON, offloaded_bytes=FALCON.step_bytes // 2)
    machine = Machine(known_device("a6000"), 2, LINKS["nvlink3"])
    seconds, sequences = FALCON.step_bytes / 2 / 25e9, 8 if scheme == "gathered" else 4
    assert decode_step(work, machine, scheme, batch=4, context=512) == Limit(seconds, "host", sequences / seconds)
    unknown = Machine(Device("card", bandwidth=1e12, flops_16=1e14))
    assert decode_step(work, unknown, "single", batch=4, context=512) is None
    cpu = Machine(Device("CPU", "cpu", bandwidth=1e10, flops_16=1e12))
    limit = decode_step(work, cpu, "single", batch=1, context=0)
    assert limit is not None
    assert limit.bound == "memory"
