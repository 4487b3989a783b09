"""ZeRO-Inference: parameters are handed to DeepSpeed one by one as they were loaded, so that no rank ever holds the
whole model.

Each rank reads the rows that contain its own contiguous range of the values of each parameter. DeepSpeed takes that
range out of a tensor of the full size, of which the other rows stay unallocated, and keeps it on the device or in main
memory.
"""

from __future__ import annotations

from math import ceil, prod
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist

from launcher.config.parts.storage import Offload
from shards.load.blocks import Block, block_of, mark_block
from shards.parallel.fully_shard import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from shards.machine.world import World
    from shards.untrusted_files import JsonObject


def partition(
    model: torch.nn.Module, world: World, device: torch.device, offload: Offload, fill: Callable[[], None]
) -> torch.nn.Module:
    """The module of DeepSpeed's engine, holding this rank's part of all values; `fill` loads values into the parameters
    that the model has when it is called."""
    on_cuda = device.type == "cuda"
    if not dist.is_initialized():
        kind = "gloo"
        if on_cuda:
            kind = "cpu:gloo,cuda:nccl"
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    settings = zero_settings(model, offload, on_cuda)
    _keep_rows(model, world)
    fill()
    parts = deepspeed.zero.Init(config_dict_or_path=settings, dtype=model.dtype)
    for parameter in model.parameters():
        block = block_of(parameter)
        assert block is not None
        values = torch.empty(block.shape, dtype=parameter.dtype, device=parameter.device)
        if block.shape:
            values[block.start[0] : block.start[0] + parameter.shape[0]].copy_(parameter.data)
        else:
            values.copy_(parameter.data)
        parameter.data = values
        del parameter.block  # type: ignore[attr-defined]
        parts._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return engine.module  # type: ignore[no-any-return]


def zero_settings(model: torch.nn.Module, offload: Offload, on_cuda: bool) -> JsonObject:
    """DeepSpeed's configuration: one decoder layer is prefetched, and none is kept after its use."""
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model))
    zero: JsonObject = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": layer,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": 0,
    }
    if offload is Offload.cpu:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "fp16": {"enabled": model.dtype is torch.float16},
        "bf16": {"enabled": model.dtype is torch.bfloat16},
    }


def _keep_rows(model: torch.nn.Module, world: World) -> None:
    """Reduce each parameter on meta to the rows that contain this rank's range of values."""
    kept: dict[int, torch.nn.Parameter] = {}
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for name, whole in list(module._parameters.items()):
            if whole is None:
                continue
            if id(whole) not in kept:
                shape, size = tuple(whole.shape), ceil(whole.numel() / world.world_size)
                begin, end = min(world.rank * size, whole.numel()), min((world.rank + 1) * size, whole.numel())
                row = max(1, prod(shape[1:]))
                first = last = begin // row
                if end > begin:
                    last = ceil(end / row)
                part, start = whole.detach(), [0] * len(shape)
                if shape:
                    part, start[0] = part[first:last], first
                kept[id(whole)] = torch.nn.Parameter(part, requires_grad=False)
                mark_block(kept[id(whole)], Block(first_names[id(whole)], shape, tuple(start)))
            module._parameters[name] = kept[id(whole)]
