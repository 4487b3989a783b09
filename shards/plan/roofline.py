"""The roofline model of a plan: the least time of one decode step and of one prefill, from bytes, FLOPs and links.

The formulas count only what must be moved or multiplied whatever the code does, so a measured rate above them is a
measurement error: a device reads its weights and the cache once for each step, and a link carries (N-1)/N of what is
gathered and 2 (N-1)/N of what is reduced (ring algorithms). Gathered weights are counted with the copies that FSDP2
makes, or with those of ranks that gather in shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shards.machine.hardware import Device, Link

Bound = Literal["memory", "compute", "link", "host"]
Scheme = Literal["single", "split", "pipeline", "gathered"]
"""The way in which N devices share a step. `split`: each has its part of each layer; `pipeline`: one device after the
other; `gathered`: each runs the whole model for its own prompts, gathered layer by layer."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time of a step or prefill, its bottleneck, and the tokens/s of all devices together at that pace."""

    seconds: float
    bound: Bound
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a model on its devices, in bytes and counts; under `gathered` batch and tokens are per rank.

    `step_bytes` are the weights that a decode step reads, `gathered_bytes` those that FSDP gathers over `gathered_over`
    devices (0: all), `gathered_in_place` where these read them in shared memory. `all_reduces` counts those of hidden
    states in one pass, `gathered_logits` the logits of each sequence that are gathered at its end. `offloaded_bytes`
    are the weights that each device is sent from main memory in every pass.
    """

    step_bytes: int
    step_parameters: int
    layer_parameters: int
    kv_bytes_per_token: int
    num_layers: int
    hidden_size: int
    dtype_bytes: int = 2
    gathered_bytes: int = 0
    gathered_over: int = 0
    gathered_in_place: bool = False
    all_reduces: int = 0
    gathered_logits: int = 0
    offloaded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """`num_devices` equal devices and the link between them, None for one device."""

    device: Device
    num_devices: int = 1
    link: Link | None = None


@dataclass(frozen=True, slots=True)
class Roofline:
    """Everything that determines a limit, except the batch and its lengths: so a finished run can be compared with the
    limit for its own batches."""

    work: Work
    machine: Machine
    scheme: Scheme

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Roofline:
        """The inverse of `dataclasses.asdict`."""
        machine = values["machine"]
        link = machine["link"] and Link(**machine["link"])
        together = Machine(Device(**machine["device"]), machine["num_devices"], link)
        return cls(Work(**values["work"]), together, values["scheme"])


def decode_step(work: Work, machine: Machine, scheme: Scheme, *, batch: float, context: float) -> Limit | None:
    """The least time in which each of `batch` sequences gets one more token, with `context` tokens in each layer's
    cache.

    For steps that differ, the mean batch and the mean context give a lower bound of the mean time. None if the device
    or the link has no known rates. t = max(bytes / bandwidth, FLOPs / rate) of the devices that work at a time, plus
    the all-reduces (tensor parallel), or the gather if that takes longer (FSDP); and at least the transfer from main
    memory.
    """
    rates = _rates(work, machine)
    if rates is None:
        return None
    bandwidth, flops, host = rates
    n = machine.num_devices
    if scheme in ("single", "pipeline"):
        n = 1
    cache = batch * context * work.kv_bytes_per_token
    compute = 2 * work.step_parameters * batch / flops
    if scheme == "gathered":
        memory = (work.step_bytes + _copied_bytes(work, machine) + cache) / bandwidth
        return _overlapped(memory, compute, _gather_s(work, machine), host, n * batch)
    memory, compute = (work.step_bytes + cache) / (n * bandwidth), compute / n
    talk = 0.0
    if scheme == "split":
        talk = _collectives_s(work, machine, batch, batch)
    return _then_link(memory, compute, talk, host, batch)


def prefill(work: Work, machine: Machine, scheme: Scheme, *, batch: float, tokens: float) -> Limit | None:
    """The least time to read prompts of `tokens` each, as in decode_step; 2 P T + 2 L T^2 h FLOPs per prompt."""
    rates = _rates(work, machine)
    if rates is None:
        return None
    bandwidth, flops, host = rates
    n = machine.num_devices
    if scheme in ("single", "pipeline"):
        n = 1
    per_prompt = 2 * work.layer_parameters * tokens + 2 * work.num_layers * tokens**2 * work.hidden_size
    memory, compute = work.step_bytes / bandwidth, batch * per_prompt / flops
    if scheme == "gathered":
        memory += _copied_bytes(work, machine) / bandwidth
        return _overlapped(memory, compute, _gather_s(work, machine), host, n * batch * tokens)
    talk = 0.0
    if scheme == "split":
        talk = _collectives_s(work, machine, batch * tokens, batch)
    return _then_link(memory / n, compute / n, talk, host, batch * tokens)


def _rates(work: Work, machine: Machine) -> tuple[float, float, float] | None:
    """Bytes/s, FLOP/s, and the seconds of each pass for transfers from main memory; on a CPU main memory is the
    device's own."""
    device, host = machine.device, machine.device.host_bandwidth
    bandwidth, flops = device.bandwidth, device.flops(work.dtype_bytes)
    if bandwidth is None or flops is None or (machine.num_devices > 1 and machine.link is None):
        return None
    if not work.offloaded_bytes or device.kind == "cpu":
        return bandwidth, flops, 0.0
    if host is None:
        return None
    return (bandwidth, flops, work.offloaded_bytes / host)


def _gathered_over(work: Work, machine: Machine) -> int:
    return work.gathered_over or machine.num_devices


def _copied_bytes(work: Work, machine: Machine) -> float:
    """Bytes moved through memory in addition to reading the weights: copy-in of the shard (read and write); with FSDP2
    also gather (write) and copy-out (read and write); a single rank only copies.

    Source: torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py; shards/parallel/shared_layers.py.
    """
    over = _gathered_over(work, machine)
    if work.gathered_in_place:
        return 2 / over * work.gathered_bytes
    if over == 1:
        return 2 * work.gathered_bytes
    return (3 + 2 / over) * work.gathered_bytes


def _gather_s(work: Work, machine: Machine) -> float:
    if machine.link is None or machine.num_devices == 1 or work.gathered_in_place:
        return 0.0
    over = _gathered_over(work, machine)
    return (over - 1) / over * work.gathered_bytes / machine.link.bandwidth


def _collectives_s(work: Work, machine: Machine, rows: float, sequences: float) -> float:
    """The all-reduces of `rows` hidden states each, and the gather of the last logits of every sequence."""
    if machine.link is None or machine.num_devices == 1:
        return 0.0
    link, part = machine.link, (machine.num_devices - 1) / machine.num_devices
    states, logits = rows * work.hidden_size, sequences * work.gathered_logits
    reduce = link.latency_s + 2 * part * states * work.dtype_bytes / link.bandwidth
    gather = 0.0
    if logits:
        gather = link.latency_s + part * logits * work.dtype_bytes / link.bandwidth
    return work.all_reduces * reduce + gather


def _overlapped(memory: float, compute: float, link: float, host: float, tokens: float) -> Limit:
    """The links work in parallel with the devices: the slowest determines the pace."""
    bounds: tuple[tuple[float, Bound], ...] = (
        (memory, "memory"), (compute, "compute"), (link, "link"), (host, "host")
    )  # fmt: skip
    seconds, bound = max(bounds, key=lambda pair: pair[0])
    return Limit(seconds, bound, tokens / seconds)


def _then_link(memory: float, compute: float, link: float, host: float, tokens: float) -> Limit:
    """The devices wait for the link between them: its time is added to theirs."""
    busy = _overlapped(memory, compute, 0.0, host, tokens)
    seconds, bound = busy.seconds + link, busy.bound
    if link > busy.seconds:
        bound = "link"
    return Limit(seconds, bound, tokens / seconds)
