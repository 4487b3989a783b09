"""RunConfig -> what `shards.plan.plan` is asked."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import psutil

from launcher.backends.vllm.options import pool_bytes
from launcher.config.schema import BACKENDS, DummyConfig, FsdpConfig, Precision, VllmConfig, Weights
from launcher.prepare.shapes import built_of
from launcher.prompts.batches import batches, call_count, split
from launcher.prompts.prompts import sampling_of
from shards.errors import PlanError
from shards.machine.hardware import CPU, GIB, Device, Link, known_device, usual_link
from shards.machine.rates import this_machine
from shards.machine.world import World
from shards.model.quantization import QUANTIZATIONS, Quantization
from shards.model.quantized_checkpoint import from_config
from shards.plan.plan import Plan, make_plan
from shards.plan.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from shards.checkpoint.tensor_files import TensorEntry

VLLM_BLOCK_TOKENS = {"cuda": 16, "cpu": 128}  # DEFAULT_BLOCK_SIZE in vllm/config/cache.py; vllm/platforms/cpu.py
ONLINE = {"fp8_per_tensor": "fp8", "fp8_per_channel": "fp8_channel", "fp8_per_block": "fp8_block"}
"""What vLLM calls the quantizations that it makes while it loads plain weights."""

FILE_DTYPES = {Precision.fp32: "F32", Precision.fp16: "F16", Precision.bf16: "BF16"}
KV_DTYPE_BYTES = {"auto": None, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
ALONE = (
    "pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
)  # fmt: skip
"""Ways of vLLM's to use several devices that are not those of a run."""


def plan_of(
    config: RunConfig,
    model_config: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry] | None,
    prompts: Sequence[Prompt],
    on_cuda: bool,
) -> Plan:
    """The plan of a run on this machine; PlanError where the model cannot be cut so, or a part does not fit.

    What is held is that of the longest prompt, the ceilings are those of the prompts as they are.
    """
    device, link = _devices(config, on_cuda)
    request = PlanRequest(
        shape=built_of(model_config, tensors, config.backend.python).shape,
        engine=config.backend.name,
        devices=config.devices,
        num_nodes=config.num_nodes,
        dtype_bytes=config.precision.num_bytes,
        quantization=quantization_of(config, model_config, on_cuda),
        prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        max_new_tokens=sampling_of(config).max_new_tokens,
        device=device,
        link=link,
        **_options(config, model_config, on_cuda),
    )
    plan = make_plan(replace(request, **_batches(config, prompts, request)))
    if not on_cuda and (problem := over_memory(config, plan, tensors, "total")):
        raise PlanError(f"{problem}.", "more nodes, fewer prompts at once, or a narrower precision")
    return plan


def over_memory(
    config: RunConfig, plan: Plan, tensors: Mapping[str, TensorEntry] | None, which: Literal["total", "available"]
) -> str | None:
    """What the ranks of this node without GPUs hold of their own, where its total or available memory is less.

    Weights that need no cast stay in their files, mapped, but for vLLM; activations are estimates, and not counted.
    """
    if config.launch.name == "slurm":
        return None
    is_read = config.model.weights is Weights.auto and not isinstance(config.backend, VllmConfig)
    dtypes = {entry.dtype for entry in (tensors or {}).values()} or {FILE_DTYPES[config.precision]}
    are_mapped = is_read and FILE_DTYPES[config.precision] in dtypes
    held = sum(
        (0 if are_mapped else device.parameter_bytes)
        + max(device.kv_cache_bytes, device.kv_cache_reserved_bytes)
        + device.buffer_bytes
        for device in plan.devices[: config.devices]
    )
    memory: int = getattr(psutil.virtual_memory(), which)
    if held <= memory:
        return None
    return f"The ranks here need {held / GIB:.1f} GiB of their own, and this machine has {memory / GIB:.1f} GiB {which}"


def paces(config: RunConfig, plan_for: Callable[[RunConfig], Plan]) -> dict[str, float]:
    """The decode ceiling of each engine that could do a run in place of its own, in tokens/s, fastest first."""
    found = {}
    for name, kind in BACKENDS.items():
        other = config if name == config.backend.name else replace(config, backend=kind(python=config.backend.python))
        with contextlib.suppress(PlanError):
            if limit := plan_for(other).limit:
                found[name] = limit.tokens_per_s
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _options(config: RunConfig, model_config: Mapping[str, Any], on_cuda: bool) -> dict[str, Any]:
    """What only this engine has."""
    backend = config.backend
    if isinstance(backend, FsdpConfig):
        return {"reshard_after_forward": backend.reshard_after_forward}
    if not isinstance(backend, VllmConfig):
        return {}
    extra, is_free_memory_known = backend.extra, config.launch.name != "slurm"  # that of the nodes only they can see
    for name in ALONE:
        if extra.get(name, 1) != 1:
            raise PlanError(
                f"backend.extra.{name}={extra[name]}: a run of vllm is tensor parallel only.", "leave it out"
            )
    return {
        "gpu_memory_utilization": backend.gpu_memory_utilization,
        "kv_cache_memory_bytes": pool_bytes(config, model_config, not on_cuda and is_free_memory_known),
        "kv_dtype_bytes": _kv_dtype_bytes(extra.get("kv_cache_dtype", "auto")),
        "kv_block_tokens": extra.get("block_size", VLLM_BLOCK_TOKENS["cuda" if on_cuda else "cpu"]),
        "max_num_seqs": extra.get("max_num_seqs", backend.max_num_seqs),
        "max_num_batched_tokens": extra.get("max_num_batched_tokens"),
    }


def _kv_dtype_bytes(name: str) -> int | None:
    if name not in KV_DTYPE_BYTES:
        known = ", ".join(KV_DTYPE_BYTES)
        raise PlanError(f"What backend.extra.kv_cache_dtype={name} takes is not known.", f"one of {known}")
    return KV_DTYPE_BYTES[name]


def quantization_of(config: RunConfig, model_config: Mapping[str, Any], on_cuda: bool) -> Quantization | None:
    """How a run holds its weights; PlanError for a quantized checkpoint that its engine cannot read."""
    backend, is_vllm = config.backend, isinstance(config.backend, VllmConfig)
    if isinstance(backend, DummyConfig) or (config.model.weights is Weights.random and not is_vllm):
        return None  # random weights of module engines are never quantized
    found = from_config(model_config)
    if found is not None and not (is_vllm and "vllm" in found.engines):
        reads = "no longer has bitsandbytes" if is_vllm else "loads plain weights only"
        hint = "use the unquantized checkpoint" + (", or backend=vllm" if "vllm" in found.engines else "")
        raise PlanError(f"The checkpoint is quantized ({found.name}), and backend={backend.name} {reads}.", hint)
    if isinstance(backend, VllmConfig) and found is None and (method := backend.extra.get("quantization")) in ONLINE:
        if not on_cuda:
            raise PlanError(f"vLLM makes {method} weights on CUDA only.", "use a checkpoint that is quantized already")
        found = QUANTIZATIONS[ONLINE[method]]
    if found is not None and config.precision is Precision.fp32 and not found.with_fp32:
        raise PlanError(f"vLLM multiplies {found.name} weights in 16 bits, not in precision=fp32.", "precision=bf16")
    return found


def _devices(config: RunConfig, on_cuda: bool) -> tuple[Device, Link | None]:
    """What the ranks run on: of a cluster the card that is named, with no figures where none is. What joins nodes is
    not known."""
    if config.launch.name != "slurm":
        device, link = this_machine(os.environ, config.devices, on_cuda)
    elif not on_cuda:
        device, link = CPU, None
    elif (name := config.cluster.device) is None:
        device, link = Device("a GPU of the cluster"), None
    else:
        device, link = known_device(name), usual_link(name)
    return device, link if config.num_nodes == 1 else None


def _batches(config: RunConfig, prompts: Sequence[Prompt], request: PlanRequest) -> dict[str, Any]:
    """How many prompts one rank answers at once, at most and in the mean over its calls, and how long they are in the
    mean: with continuous batching all that the engine takes, else those of a call, padded to the longest of it."""
    if config.backend.continuous_batching:
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        return {"batch_size": min(len(prompts), request.sequences), "mean_prompt_tokens": tokens / len(prompts)}
    data_parallel, world = config.backend.data_parallel, World(world_size=config.devices * config.num_nodes)
    size, calls = call_count(len(prompts), world, config)
    ranks = [replace(world, rank=rank) for rank in range(world.world_size if data_parallel else 1)]
    made = [call for rank in ranks for call in batches(split(prompts, rank, data_parallel), size, calls) if call]
    padded = sum(len(call) * max(len(prompt.token_ids) for prompt in call) for call in made)
    return {
        "batch_size": max(map(len, made)),
        "mean_batch_size": len(prompts) / (calls * len(ranks)),
        "mean_prompt_tokens": padded / len(prompts),
    }
