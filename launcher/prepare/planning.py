"""Convert a RunConfig to a request of `shards.plan.plan`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from launcher.config.engines import engines
from launcher.config.machine import described, given_of, other_machine
from launcher.config.parts.formats import WeightFormat, Weights
from launcher.config.parts.storage import Offload, Precision
from launcher.config.schema import DEFAULT_PREFILL_TOKENS, Accelerator
from launcher.prepare.shapes import built_of
from launcher.prepare.speculative import draft_shape
from launcher.prompts.batches import batches, call_count, split
from launcher.prompts.prompts import sampling_of
from shards.checkpoint.adapter_config import factor_shapes
from shards.engines.base import ModulePlanner
from shards.errors import PlanError
from shards.machine.hardware import CPU, GIB, Device, Link, known_device, known_link, usual_link
from shards.machine.interpreter import pip_install
from shards.machine.rates import this_machine
from shards.machine.world import World
from shards.model.quantization import Quantization
from shards.model.quantized_checkpoint import from_config
from shards.plan.plan import Plan, make_plan
from shards.plan.request import EnginePlanner, PlanRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from shards.checkpoint.tensor_files import TensorEntry
    from shards.model.config_fields import TransformersConfig
    from shards.untrusted_files import JsonObject

OF_BITSANDBYTES = ("int8", "nf4", "nf4_dq", "fp4")
FILE_DTYPES = {Precision.fp32: "F32", Precision.fp16: "F16", Precision.bf16: "BF16"}


def plan_of(
    config: RunConfig,
    model_config: TransformersConfig,
    tensors: Mapping[str, TensorEntry] | None,
    prompts: Sequence[Prompt],
    on_cuda: bool,
    at_once: int | None = None,
) -> Plan | None:
    """The plan of a run; PlanError if the model cannot be split over these devices, or does not fit.

    Memory is planned for the longest prompt, ceilings for the actual prompts, or for `at_once` of them on all devices
    together. None if the engine has no planner.
    """
    quantization = quantization_of(config, model_config, on_cuda)
    planner = config.backend.planner(config, model_config, on_cuda)
    if planner is None:
        if config.precision.is_mixed:
            fact = f"precision={config.precision.name}, and backend={config.backend.name} has no mixed precision."
            raise PlanError(fact, "precision=bf16")
        if config.offload is not Offload.none:
            fact = f"offload={config.offload.name}, and backend={config.backend.name} offloads no weights."
            raise PlanError(fact, "offload=none")
        return None
    if isinstance(planner, ModulePlanner) and config.is_continuous:
        planner = replace(planner, prefill_tokens=config.measure.prefill_tokens or DEFAULT_PREFILL_TOKENS)
    device, link = _devices(config, on_cuda)
    shape = built_of(model_config, tensors, config.backend.python).shape
    if adapters := [factor_shapes(Path(folder)) for folder in config.adapter.beside]:
        shape = replace(shape, parameters=(*shape.parameters, *planner.factors(shape, adapters)))
    request = PlanRequest(
        shape=shape,
        engine=planner,
        devices=config.devices,
        num_nodes=config.num_nodes,
        dtype_bytes=config.precision.num_bytes,
        mixed_bytes=config.precision.mixed_bytes,
        quantization=quantization,
        offload=config.offload.value,
        prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        max_new_tokens=sampling_of(config).max_new_tokens,
        guessed_tokens=config.speculative.most,
        draft=draft_shape(config),
        device=device,
        link=link,
        alternatives=default_planners(),
    )
    shares = _batches(config, prompts, request)
    if at_once is not None:
        each = at_once / config.num_shares
        shares |= {"batch_size": ceil(each), "mean_batch_size": each}
    return make_plan(replace(request, **shares))


def short_memory(config: RunConfig, plan: Plan, tensors: Mapping[str, TensorEntry] | None) -> str | None:
    """A line for the user if the ranks of this node need more main memory than is free, otherwise None.

    Weights that `shards.load` reads are not counted if they need no cast, since they stay in their mapped files;
    activations are only estimates, and not counted either. On CUDA only weights offloaded to main memory count.
    """
    if config.launch.name == "slurm" or config.machine is not None:
        return None
    is_read = config.model.weights is Weights.auto and config.backend.loads_by_name
    dtypes = {entry.dtype for entry in (tensors or {}).values()} or {FILE_DTYPES[config.precision.weights]}
    are_mapped = is_read and FILE_DTYPES[config.precision.weights] in dtypes
    needed = 0
    for device in plan.devices[: config.devices]:
        if config.offload is Offload.cpu:
            needed += device.offloaded_bytes
        if config.accelerator is not Accelerator.cpu:
            continue
        if not are_mapped:
            needed += device.parameter_bytes
        needed += max(device.kv_cache_bytes, device.kv_cache_reserved_bytes) + device.buffer_bytes
        needed += device.draft_parameter_bytes + device.draft_cache_bytes
    memory: int = psutil.virtual_memory().available
    if needed <= memory:
        return None
    return f"the ranks here need {needed / GIB:.1f} GiB of their own, and {memory / GIB:.1f} GiB are free"


def default_planners() -> tuple[EnginePlanner, ...]:
    """The planners of all engines that have one, with default options."""
    return tuple(kind.planner_class() for kind in engines().values() if kind.planner_class)


def paces(
    config: RunConfig, plan_for: Callable[[RunConfig, int | None], Plan | None], at_once: int
) -> dict[str, float]:
    """The decode ceiling of a run with its own and with each other engine, in tokens/s, fastest first.

    All are for `at_once` prompts at a time.
    """
    ceilings = {}
    for name, kind in engines().items():
        if kind.planner_class is None and name != config.backend.name:
            continue
        other = config
        if name != config.backend.name:
            other = replace(config, backend=kind(python=config.backend.python))
        with contextlib.suppress(PlanError):
            plan = plan_for(other, at_once)
            if plan is not None and plan.limit is not None:
                ceilings[name] = plan.limit.tokens_per_s
    return dict(sorted(ceilings.items(), key=lambda item: -item[1]))


def quantization_of(config: RunConfig, model_config: TransformersConfig, on_cuda: bool) -> Quantization | None:
    """The format of a run's weights; PlanError for a quantized checkpoint that its engine cannot read."""
    name, backend = config.quantization.name, config.backend
    if config.quantization is not WeightFormat.none and name not in backend.quantizations:
        able = [kind for kind, engine in engines().items() if name in engine.quantizations]
        fact = f"backend={backend.name} makes no {name} weights"
        if backend.quantizations:
            fact += f", but {', '.join(backend.quantizations)}"
        raise PlanError(f"{fact}.", f"backend={able[0]}")
    if name in OF_BITSANDBYTES and backend.python is None and importlib.util.find_spec("bitsandbytes") is None:
        raise PlanError(f"quantization={name} needs bitsandbytes.", pip_install("quantization"))
    is_random = config.model.weights is Weights.random and not backend.own_random_weights
    if not backend.needs_weights or is_random:
        return backend.quantization(config, None, on_cuda)
    stored = from_config(model_config)
    if stored is not None and config.quantization is not WeightFormat.none:
        raise PlanError(
            f"quantization={name}: the checkpoint is quantized already ({stored.name}).",
            "quantization=none",
        )
    if stored is not None and not backend.reads(stored):
        readers = [f", or backend={name}" for name, kind in engines().items() if kind.reads(stored)]
        raise PlanError(
            f"The checkpoint is quantized ({stored.name}), and backend={backend.name} {backend.stored_weights}.",
            "use the unquantized checkpoint" + "".join(readers),
        )
    return backend.quantization(config, stored, on_cuda)


def _devices(config: RunConfig, on_cuda: bool) -> tuple[Device, Link | None]:
    """The device and link of the ranks; on a cluster the configured GPU, or one without figures if none is configured.
    Between nodes the link is only known from `link`."""
    device: Device
    link: Link | None
    if (other := other_machine(config)) is not None:
        device, link = other
    elif config.launch.name != "slurm":
        device, link = this_machine(os.environ, config.devices, on_cuda)
    elif not on_cuda:
        device, link = CPU, None
    elif (name := config.cluster.device) is None:
        device, link = Device("a GPU of the cluster"), None
    else:
        device, link = known_device(name), usual_link(name)
    if config.num_nodes > 1:
        link = None
    if config.link is not None:
        link = known_link(config.link)
    return described(device, given_of(config), config.precision.products.num_bytes), link


def _batches(config: RunConfig, prompts: Sequence[Prompt], request: PlanRequest) -> JsonObject:
    """Fields of a PlanRequest: the largest and the mean number of prompts that one rank answers at a time, and their
    mean length in tokens.

    With continuous batching these are the prompts in the engine or its slots, otherwise those of a call, padded to its
    longest prompt.
    """
    mean_tokens = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    if config.backend.continuous_batching:
        at_once = len(prompts)
        if (pool := request.engine.pool(request)) is not None:
            at_once = min(at_once, pool.sequences)
        return {"batch_size": at_once, "mean_prompt_tokens": mean_tokens}
    if config.is_continuous:
        share = ceil(len(prompts) / config.num_shares)
        slots = min(config.measure.batch_size, share)
        calls = config.num_shares * ceil(share / slots)  # if all answers have full length
        return {"batch_size": slots, "mean_batch_size": len(prompts) / calls, "mean_prompt_tokens": mean_tokens}
    world = World(world_size=config.num_devices)
    size, calls = call_count(len(prompts), world, config)
    ranks = [replace(world, rank=rank) for rank in range(config.num_shares)]
    all_calls = [call for rank in ranks for call in batches(split(prompts, rank, config), size, calls) if call]
    padded = sum(len(call) * max(len(prompt.token_ids) for prompt in call) for call in all_calls)
    return {
        "batch_size": max(map(len, all_calls)),
        "mean_batch_size": len(prompts) / (calls * len(ranks)),
        "mean_prompt_tokens": padded / len(prompts),
    }
