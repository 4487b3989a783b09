"""Memory figures of vLLM's workers; vLLM mixes this class into its own worker class, in the worker's process."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from launcher.backends.memory import module_memory, parameter_bytes, storage_bytes

if TYPE_CHECKING:
    from shards.untrusted_files import JsonObject


class WorkerMemory:
    """A worker extension: `collective_rpc("device_memory")` gives one entry for each worker."""

    def device_memory(self) -> JsonObject:
        """The fields of DeviceMemory without `kv_cache_bytes`, plus `num_blocks`, the number of blocks of the KV
        cache."""
        runner = self.model_runner  # type: ignore[attr-defined]
        memory = asdict(module_memory(runner.model, runner.device, self.rank, {}))  # type: ignore[attr-defined]
        del memory["kv_cache_bytes"]
        memory["parameter_bytes"] = held_bytes(runner.model, runner.device)
        memory["offloaded_bytes"] = offloaded_bytes(runner.model)
        if memory["parameter_bytes"] is None:
            memory["reasons"]["parameter_bytes"] = "quantized weights were repacked into memory that no tensor shows"
        if runner.device.type == "cpu":
            memory["tensor_bytes"] = None
            memory["reasons"]["tensor_bytes"] = "linear weights are packed into memory that tensors do not show"
        del memory["reasons"]["kv_cache_reserved_bytes"]
        memory["kv_cache_reserved_bytes"] = storage_bytes(runner.kv_caches)
        draft = getattr(getattr(runner, "drafter", None), "model", None)
        if isinstance(draft, torch.nn.Module):
            memory["draft_parameter_bytes"] = held_bytes(draft, runner.device) or 0
        memory["num_blocks"] = runner.kv_cache_config.num_blocks
        return memory


def held_bytes(model: torch.nn.Module, device: torch.device) -> int | None:
    """Bytes of this worker's share of the parameters; None if unknown.

    On a CPU vLLM packs the weight of a linear layer into memory of its kernels and leaves an empty parameter: the bytes
    are computed from the sizes that the layer keeps.
    """
    packed = 0
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.numel():
            continue
        sizes = _matrix(module)
        if sizes is None:
            return None
        packed += sizes[0] * sizes[1] * weight.element_size()
    return parameter_bytes(model, device) + packed + adapter_bytes(model) - offloaded_bytes(model)


def adapter_bytes(model: torch.nn.Module) -> int:
    """Bytes reserved for adapters: stacks of factors that are plain attributes of the layers."""
    stacks = [vars(module).get(name, ()) for module in model.modules() for name in ("lora_a_stacked", "lora_b_stacked")]
    return sum(tensor.nbytes for stack in stacks for tensor in stack)


def offloaded_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters in main memory that the GPU reads directly."""
    return sum(p.nbytes for p in model.parameters() if getattr(p, "_vllm_is_uva_offloaded", False))


def _matrix(module: torch.nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear layer's own share; a replicated layer has no share, but whole sizes."""
    for names in (("output_size_per_partition", "input_size_per_partition"), ("output_size", "input_size")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None
