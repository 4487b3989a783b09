"""DeepSpeed-Inference: AutoTP cuts every layer over the ranks, which answer each prompt together; or ZeRO-Inference.

AutoTP is given the model on meta and only decides who gets what. Each rank then reads its own blocks of the checkpoint,
so that loading takes no more memory than the blocks themselves, however many ranks a node has.
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
from launcher.config.schema import ConfigError
from launcher.config.storage import Offload
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
    """`deepspeed.init_inference`, tensor parallel over all ranks, or with `zero` ZeRO stage 3; a world of one is the
    plain model, unless that is offloaded."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.options: DeepSpeedConfig = config.backend  # type: ignore[assignment]
        adds_up = config.devices > 1 and config.num_nodes == 1 and not self.options.zero
        self.obstacle: str | None = "ZeRO adds nothing up" if self.options.zero else None
        if adds_up and get_accelerator().device_name() == "cpu":
            self.obstacle = deepspeed_reduce.compile_operation()

    def place(self, plan: Plan | None, world: World, progress: Progress) -> torch.nn.Module:
        _check_accelerator(self.device)
        model = self.meta_model()
        if self.options.zero and (world.world_size > 1 or self.config.offload is not Offload.none):
            return self._partitioned(model, world, progress)
        if world.world_size == 1:
            self.fill(model, progress)
            return self._injected(model, 1)
        is_through_memory = False
        if self.device.type == "cpu":
            why = deepspeed_reduce.choose(world, self.obstacle)
            is_through_memory = why is None
            print(f"all-reduce: {'shared memory' if why is None else f'gloo, since {why}'}", flush=True)
        first_names = _first_names(model)
        model = self._injected(model, world.world_size)
        if is_through_memory:
            deepspeed_reduce.forget_segment(world)
        mark_blocks(model, first_names, world.rank)
        _forget_computed_buffers(model)
        self.fill(model, progress)
        return model

    def _partitioned(self, model: torch.nn.Module, world: World, progress: Progress) -> torch.nn.Module:
        """The model that ZeRO gathers module by module; its values are copies, and no longer those of the files."""
        if self.device.type == "cpu":
            deepspeed_reduce.choose(world, self.obstacle)
        model = partition(model, world, self.config.offload, lambda: self.fill(model, progress))
        self.mapped_files = frozenset()
        return model

    def packs(self, model: torch.nn.Module) -> bool:
        return not self.options.zero and super().packs(model)

    def _injected(self, model: torch.nn.Module, size: int) -> torch.nn.Module:
        """The model that `init_inference` returns; one on meta comes back cut, on its device, without values."""
        # The engine's own generate() asks for this limit, a forward pass does not: it has none.
        limit = self.options.max_out_tokens or getattr(model.config, "max_position_embeddings", None)
        engine = deepspeed.init_inference(
            model,
            tensor_parallel={"tp_size": size},
            dtype=self.dtype,
            replace_with_kernel_inject=False,
            **({"max_tokens": limit} if limit else {}),
        )
        return engine.module  # type: ignore[no-any-return]


def _check_accelerator(device: torch.device) -> None:
    chosen = get_accelerator().device_name()
    if chosen != device.type:
        raise ConfigError(
            f"The run is on {device.type}, and DeepSpeed has taken {chosen}.", f"export DS_ACCELERATOR={device.type}"
        )


def _first_names(model: torch.nn.Module) -> dict[str, str]:
    """Under which name a model first has each parameter: tied ones have several."""
    first: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in parameters}


def mark_blocks(model: torch.nn.Module, first_names: Mapping[str, str], rank: int) -> None:
    """Note on each parameter of a model that AutoTP has cut which block of the uncut model it is."""
    for module in model.modules():
        # The notes for DeepSpeed's universal checkpoints were on the parameters of the meta device, which are gone.
        if note := getattr(module, "_mark_uc_metadata", None):
            note()
    for name, parameter in model.named_parameters():
        mark_block(parameter, _block(first_names[name], parameter, getattr(parameter, DS_AUTOTP_UC_META, None), rank))


def _block(name: str, parameter: torch.Tensor, notes: Mapping[str, Any] | None, rank: int) -> Block:
    dim = None if notes is None else notes["partition_dim"]
    if notes is None or dim is None:
        return Block(name, tuple(parameter.shape), (0,) * parameter.dim())
    groups = [notes["partition_sizes"]] if notes["partition_sizes"] else notes["sub_param_shard_widths"] or []
    shape = tuple(notes["logical_shape"])
    piece = (*shape[:dim], groups[0][rank], *shape[dim + 1 :]) if len(groups) == 1 else ()
    if piece != tuple(parameter.shape):
        raise PlanError(
            f"DeepSpeed cuts {name} {list(shape)} to {list(parameter.shape)} otherwise than by one block a rank.",
            "backend=fsdp, or devices=1",
        )
    start = sum(groups[0][:rank])
    return Block(name, shape, tuple(start if axis == dim else 0 for axis in range(len(shape))))


def _forget_computed_buffers(model: torch.nn.Module) -> None:
    """Put the buffers that no checkpoint holds (rotary frequencies) back on meta: they were left without values."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(name)) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
