"""Tensor parallel with torch and transformers alone: each layer cut over the ranks; all answer each prompt together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.backends.module import ModuleBackend
from shards.parallel.tensor_parallel import tensor_parallel_model

if TYPE_CHECKING:
    import torch

    from launcher.backends.module import Progress
    from shards.machine.world import World
    from shards.plan.plan import Plan


class TensorParallelBackend(ModuleBackend):
    """Our own cut of transformers' Falcon, Llama, Mistral, Qwen2 and Qwen3; a world of one is the plain model."""

    def place(self, plan: Plan | None, world: World, progress: Progress) -> torch.nn.Module:
        model = tensor_parallel_model(self.meta_model(), world.rank, world.world_size)
        self.fill(model, progress)
        return model
