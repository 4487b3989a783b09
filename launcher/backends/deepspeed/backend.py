"""DeepSpeed-Inference. AutoTP cuts every layer over the ranks, which answer each prompt together; with `zero`,
ZeRO-Inference shards every parameter.

AutoTP is given the model on the meta device and only decides which rank gets which block. Each rank then reads its own
blocks of the checkpoint, so that loading takes no more memory than the blocks, however many ranks a node has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

from launcher.backends.deepspeed import all_reduce as deepspeed_reduce
from launcher.backends.deepspeed.zero import partition
from launcher.backends.module import ModuleBackend
from launcher.config.parts.storage import Offload
from launcher.config.schema import ConfigError
from shards.errors import PlanError
from shards.load.blocks import Block, mark_block

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.backends.deepspeed.engine import DeepSpeedConfig
    from launcher.backends.module import Progress
    from launcher.config.schema import RunConfig
    from shards.machine.world import World
    from shards.plan.plan import Plan


class DeepSpeedBackend(ModuleBackend):
    """`deepspeed.init_inference`, tensor parallel over all ranks, or with `zero` ZeRO stage 3. A world of one rank is
    the plain model, unless its weights are offloaded."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.options: DeepSpeedConfig = config.backend  # type: ignore[assignment]
        adds_up = config.devices > 1 and config.num_nodes == 1 and not self.options.zero
        self.obstacle: str | None = None
        if self.options.zero:
            self.obstacle = "ZeRO adds nothing up"
        elif adds_up and get_accelerator().device_name() == "cpu":
            self.obstacle = deepspeed_reduce.compile_operation()

    def place(self, plan: Plan | None, world: World, progress: Progress) -> torch.nn.Module:
        chosen = get_accelerator().device_name()
        if chosen != self.device.type:
            raise ConfigError(
                f"The run is on {self.device.type}, and DeepSpeed has taken {chosen}.",
                f"export DS_ACCELERATOR={self.device.type}",
            )
        model = self.meta_model()
        if self.options.zero and (world.world_size > 1 or self.config.offload is not Offload.none):
            if self.device.type == "cpu":
                deepspeed_reduce.choose(world, self.obstacle)
            model = partition(model, world, self.device, self.config.offload, lambda: self.fill(model, progress))
            self.mapped_files = frozenset()  # its values are copies, not mapped files
            return model
        if world.world_size == 1:
            self.fill(model, progress)
            return self._injected(model, 1)
        way = "NCCL"
        if self.device.type == "cpu":
            way = "shared memory"
            if (reason := deepspeed_reduce.choose(world, self.obstacle)) is not None:
                way = f"gloo, since {reason}"
            print(f"all-reduce: {way}", flush=True)
        first: dict[int, str] = {}  # the first name of each parameter, by id: a tied one has several
        parameters = model.named_parameters(remove_duplicate=False)
        first_names = {name: first.setdefault(id(parameter), name) for name, parameter in parameters}
        model = self._injected(model, world.world_size)
        if way == "shared memory":
            deepspeed_reduce.forget_segment(world)
        mark_blocks(model, first_names, world.rank)
        for module in model.modules():  # `fill` computes buffers on meta; these came back uninitialised
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(name)) is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="meta")
        self.fill(model, progress)
        return model

    def packs(self, model: torch.nn.Module) -> bool:
        return not self.options.zero and super().packs(model)

    def _injected(self, model: torch.nn.Module, size: int) -> torch.nn.Module:
        """The model that `init_inference` returns; one on meta comes back cut, on its device, without values."""
        # Only the engine's own generate() enforces this limit; forward passes, as used here, have none.
        limit = self.options.max_out_tokens or getattr(model.config, "max_position_embeddings", None)
        settings: dict[str, Any] = {"tensor_parallel": {"tp_size": size}, "dtype": self.dtype}
        if limit:
            settings["max_tokens"] = limit
        engine = deepspeed.init_inference(model, replace_with_kernel_inject=False, **settings)
        return engine.module  # type: ignore[no-any-return]


def mark_blocks(model: torch.nn.Module, first_names: Mapping[str, str], rank: int) -> None:
    """Mark on each parameter of a model that AutoTP has cut which block of the uncut model it is."""
    for module in model.modules():
        # DeepSpeed's notes for universal checkpoints were on the meta parameters, which have been replaced: make them
        # again.
        if note := getattr(module, "_mark_uc_metadata", None):
            note()
    for given_name, parameter in model.named_parameters():
        name, notes = first_names[given_name], getattr(parameter, DS_AUTOTP_UC_META, None)
        if notes is None or notes["partition_dim"] is None:
            mark_block(parameter, Block(name, tuple(parameter.shape), (0,) * parameter.dim()))
            continue
        dim, shape = notes["partition_dim"], tuple(notes["logical_shape"])
        groups = notes["sub_param_shard_widths"] or []
        if notes["partition_sizes"]:
            groups = [notes["partition_sizes"]]
        if len(groups) != 1 or (*shape[:dim], groups[0][rank], *shape[dim + 1 :]) != tuple(parameter.shape):
            raise PlanError(
                f"DeepSpeed cuts {name} {list(shape)} to {list(parameter.shape)} otherwise than by one block a rank.",
                "backend=fsdp, or devices=1",
            )
        start = [0] * len(shape)
        start[dim] = sum(groups[0][:rank])
        mark_block(parameter, Block(name, shape, tuple(start)))
