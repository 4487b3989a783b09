"""RunConfig -> what `shards.plan` is asked."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher.backends.vllm_options import pool_bytes
from launcher.config import BACKENDS, DummyConfig, FsdpConfig, Precision, VllmConfig, Weights
from launcher.prompts import sampling_of
from launcher.shapes import built_of
from shards.errors import PlanError
from shards.hardware import CPU, GIB, Device, Link, known_device, usual_link
from shards.measured import this_machine
from shards.plan import Plan, PlanRequest, make_plan
from shards.quantization import QUANTIZATIONS, Quantization
from shards.quantized_checkpoint import from_config

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.backend import Prompt
    from launcher.config import RunConfig
    from shards.limits import Limit
    from shards.tensor_files import TensorEntry

VLLM_BLOCK_TOKENS = {"cuda": 16, "cpu": 128}  # DEFAULT_BLOCK_SIZE in vllm/config/cache.py; vllm/platforms/cpu.py
ONLINE = {"fp8_per_tensor": "fp8", "fp8_per_channel": "fp8_channel", "fp8_per_block": "fp8_block"}
"""What vLLM calls the quantizations that it makes while it loads plain weights."""


def plan_of(
    config: RunConfig,
    model_config: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry] | None,
    prompts: Sequence[Prompt],
    on_cuda: bool,
) -> Plan:
    """The plan of a run on this machine; PlanError where the model cannot be cut so, or a part does not fit.

    Where there are fewer prompts than the ranks could take at once, the ceilings are those of the ranks that have some.
    """
    device, link = _devices(config, on_cuda)
    request = PlanRequest(
        shape=built_of(model_config, tensors, config.backend.python).shape,
        engine=config.backend.name,
        devices=config.devices,
        num_nodes=config.num_nodes,
        dtype_bytes=config.precision.num_bytes,
        quantization=quantization_of(config, model_config, on_cuda),
        batch_size=_batch_size(config, len(prompts), device),
        prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        max_new_tokens=sampling_of(config).max_new_tokens,
        device=device,
        link=link,
        **_options(config, model_config, device, on_cuda),
    )
    at_once = request.batch_size * (request.num_devices if config.backend.data_parallel else 1)
    busy = min(1.0, len(prompts) / at_once)
    plan = make_plan(request)
    return replace(plan, limit=_part(plan.limit, busy), prefill_limit=_part(plan.prefill_limit, busy))


def paces(config: RunConfig, plan_for: Callable[[RunConfig], Plan]) -> dict[str, float]:
    """The decode ceiling of each engine that could do a run in place of its own, in tokens/s, fastest first."""
    found = {}
    for name, kind in BACKENDS.items():
        other = config if name == config.backend.name else replace(config, backend=kind(python=config.backend.python))
        with contextlib.suppress(PlanError):
            if limit := plan_for(other).limit:
                found[name] = limit.tokens_per_s
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _options(config: RunConfig, model_config: Mapping[str, Any], device: Device, on_cuda: bool) -> dict[str, Any]:
    """What only this engine has."""
    backend = config.backend
    if isinstance(backend, FsdpConfig):
        return {"reshard_after_forward": backend.reshard_after_forward}
    if not isinstance(backend, VllmConfig):
        return {}
    is_free_memory_known = config.launch.name != "slurm"  # that of the nodes only they can see
    return {
        "gpu_memory_utilization": backend.gpu_memory_utilization,
        "kv_cache_memory_bytes": pool_bytes(config, model_config, not on_cuda and is_free_memory_known),
        "kv_block_tokens": backend.extra.get("block_size", VLLM_BLOCK_TOKENS["cuda" if on_cuda else "cpu"]),
        "max_num_seqs": _sequences(config, backend, device),
    }


def _part(limit: Limit | None, busy: float) -> Limit | None:
    return limit and replace(limit, tokens_per_s=busy * limit.tokens_per_s)


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
    """What the ranks run on: of a cluster the card that is named, with no figures where none is, nor between nodes."""
    if config.launch.name != "slurm":
        return this_machine(os.environ, config.devices * config.num_nodes, on_cuda)
    if not on_cuda:
        return CPU, None
    if (name := config.cluster.device) is None:
        return Device("a GPU of the cluster"), None
    return known_device(name), usual_link(name) if config.num_nodes == 1 else None


def _batch_size(config: RunConfig, prompts: int, device: Device) -> int:
    """How many prompts one rank answers at once: with continuous batching all that the engine takes."""
    if isinstance(config.backend, VllmConfig):
        return min(prompts, _sequences(config, config.backend, device))
    share = -(-prompts // (config.devices * config.num_nodes)) if config.backend.data_parallel else prompts
    return min(config.measure.batch_size, share)


def _sequences(config: RunConfig, backend: VllmConfig, device: Device) -> int:
    """How many sequences vLLM takes at once: as it is told, else get_batch_defaults in vllm/engine/arg_utils.py."""
    if asked := backend.extra.get("max_num_seqs", backend.max_num_seqs):
        return int(asked)
    if device.kind == "cpu":
        return 256 * config.devices * config.num_nodes
    is_large = (device.capacity_bytes or 0) >= 70 * GIB and "a100" not in device.name.lower()
    return 1024 if is_large else 256
