"""Fully sharded data parallel: Lightning Fabric's ModelParallelStrategy with FSDP2, the prompts split over the ranks.

Every rank holds 1/N of each parameter (resident layers whole), gathers one layer at a time and answers its own prompts.
Each forward pass is a collective, so all ranks take the same number of steps. A world of one rank is the plain model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from launcher.backends.module import ModuleBackend
from launcher.config.parts.storage import Offload
from shards.machine.heap import keep_freed_pages
from shards.parallel.collectives import collectives
from shards.parallel.fully_shard import fully_shard_model, reset_bookkeeping, reshard

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from launcher.backends.base import Completion, DeviceMemory, Generation, OnStep, Prompt
    from launcher.backends.module import Progress
    from launcher.config.schema import SamplingConfig
    from shards.machine.world import World
    from shards.plan.plan import Plan


RESET_STEPS = 500  # steps between two resets of FSDP2's bookkeeping, which grows by some 3 kB per forward


class FsdpBackend(ModuleBackend):
    """FSDP2 applied to every decoder layer and to the root module."""

    def place(self, plan: Plan | None, world: World, progress: Progress) -> torch.nn.Module:
        assert plan is not None, "the plan says which layers stay whole"
        resident, is_hybrid = plan.settings["resident_layers"], bool(plan.settings["within_node"])
        model = self.meta_model()
        self.quantize(model)
        if world.world_size == 1:
            self.fill(model, progress)
            return model

        if self.device.type == "cpu":
            keep_freed_pages()
        narrowed = None
        if self.config.precision.is_mixed:
            narrowed = self.product_dtype
        ways = collectives(world, self.device, within_node=is_hybrid)
        print(f"all-gather: {ways.way}", flush=True)

        def shard(module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
            over = mesh["data_parallel"]
            if is_hybrid:
                shape = (world.num_nodes, world.local_world_size)
                over = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
            fully_shard_model(module, over, resident, ways, narrowed, self.config.offload is Offload.cpu)
            self.fill(module, progress)  # done here, so that Fabric finds nothing on meta to initialise
            return module

        strategy = ModelParallelStrategy(shard, data_parallel_size=world.world_size, tensor_parallel_size=1)
        fabric = Fabric(
            accelerator=self.device.type,
            devices=world.local_world_size,
            num_nodes=world.num_nodes,
            strategy=strategy,
            plugins=[TorchElasticEnvironment()],
        )
        fabric.launch()
        fabric.setup(model, move_to_device=False)
        if ways.is_immediate and not is_hybrid:
            self.gather = ways.gather
        return model

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        steps = 0

        def count(new_tokens: int, finished: Sequence[Completion] = ()) -> None:
            nonlocal steps
            steps += 1
            if steps % RESET_STEPS == 0:
                reset_bookkeeping(self.model)
            on_step(new_tokens, finished)

        generation = super().generate(prompts, sampling, count)
        reset_bookkeeping(self.model)
        return generation

    def memory(self) -> list[DeviceMemory]:
        reshard(self.model)
        return super().memory()
