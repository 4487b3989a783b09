"""The FSDP2 cut: every decoder layer and the root are split by rows over the ranks of a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from shards.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules of one class: `transformer.h` of Falcon, `model.layers` of Llama."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    if not lists:
        raise PlanError(
            f"{type(model).__name__} has no list of decoder layers, so it cannot be sharded by layers.",
            "use backend=transformers",
        )
    return max(lists, key=len)


def fully_shard_model(model: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool = True) -> nn.Module:
    """Shard `model` in place over the one-dimensional `mesh`, each layer gathered only while it runs.

    What is outside the layers (embeddings, last norm, head; tied weights once) is the group of the root. It is needed
    first and last in every step, so it is gathered once and stays, until `reshard`. A mesh of one rank leaves the model
    as it is. Works on meta, so that loading never holds more than the shard.
    """
    if mesh.size() == 1:
        return model
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def reshard(model: nn.Module) -> None:
    """Free what is gathered: afterwards a rank holds its shards only, until the next forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reset_bookkeeping(model: nn.Module) -> None:
    """Forget the forwards since the last call: FSDP2 notes each one for a backward that never comes.

    Only for between forwards. The notes hold no parameter, so resident layers stay resident.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _groups(module):
                group.comm_ctx.post_forward_order.clear()
                group._post_forward_indices.clear()


def bookkeeping_entries(model: nn.Module) -> int:
    """How many forwards FSDP2 has noted since the last reset, over all groups."""
    return sum(
        len(group._post_forward_indices)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in _groups(module)
    )


def _groups(module: FSDPModule) -> list[Any]:
    """The parameter groups of one sharded module, under the name that this torch has for them (2.10 had one group)."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []
