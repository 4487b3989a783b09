"""Tensor parallelism with only torch and transformers: each layer is cut over the ranks, which answer each prompt
together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.backends.module import ModuleBackend
from launcher.config.parts.formats import WeightFormat
from shards.parallel.collectives import collectives
from shards.parallel.products import fuse_projections, least_packed
from shards.parallel.tensor_parallel import tensor_parallel_model

if TYPE_CHECKING:
    import torch

    from launcher.backends.module import Progress
    from shards.machine.world import World
    from shards.plan.plan import Plan


class TensorParallelBackend(ModuleBackend):
    """transformers' Falcon, Llama, Mistral, Qwen2 and Qwen3, cut by this project. A world of one rank is the plain
    model."""

    def place(self, plan: Plan | None, world: World, progress: Progress) -> torch.nn.Module:
        model = self.meta_model()
        if world.world_size > 1:
            ways = collectives(world, self.device)
            print(f"all-reduce: {ways.way}", flush=True)
            tensor_parallel_model(model, world.rank, world.world_size, ways)
        self.quantize(model)
        least = 0 if self.device.type == "cuda" else least_packed(self.dtype)
        if self.config.quantization is WeightFormat.none and least is not None and self.packs(model):
            fuse_projections(model, least)
        self.fill(model, progress)
        return model
