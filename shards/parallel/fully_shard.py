"""Sharding by FSDP2: every decoder layer and the root module are split by rows over the ranks of a mesh."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import Work
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from shards.errors import PlanError
from shards.load.quantized.quantizers import whole_parameters
from shards.parallel.shared_layers import share_layers
from shards.plan.cuts import spread_evenly

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from shards.parallel.collectives import Collectives


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


def fully_shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    resident_layers: int = 0,
    collectives: Collectives | None = None,
    gather_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> nn.Module:
    """Shard `model` in place over the last dimension of `mesh`; each layer is gathered only while it runs.

    A first dimension of the mesh holds replicas (HSDP). `resident_layers` of the layers, spread evenly, stay whole on
    each rank, together with everything outside the layers (embeddings, last norm, head; tied weights once). Without
    resident layers, everything outside the layers is the group of the root: needed first and last in every step, it is
    gathered once and stays until `reshard`. With `collectives` the layers are gathered through them, in shared memory
    if the ranks have it, and their matrices in `gather_dtype`. A mesh with a single rank to shard over leaves the model
    as it is. It works on meta, so that loading never holds more than the shard. With `offload` the shards are in pinned
    main memory, into which they must be loaded, and are copied to the device before a gather.
    """
    layers = decoder_layers(model)
    resident = spread_evenly(resident_layers, len(layers))
    sharded = [layer for number, layer in enumerate(layers) if number not in resident]
    if mesh.size(-1) == 1 or not sharded:
        return model
    policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    for layer in sharded:
        whole = whole_parameters(layer)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole, offload_policy=policy)
        if gather_dtype is not None:
            _narrow_gathered(layer, gather_dtype)
    elsewhere = {parameter for layer in sharded for parameter in layer.parameters()}
    kept = set(model.parameters()) - elsewhere if resident else whole_parameters(model)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=kept, offload_policy=policy)
    if collectives is None or not collectives.is_immediate:
        _prefetch(model, sharded, layers[-1])
        return model
    model.shared_layers = share_layers(sharded, collectives, gather_dtype)
    gather = _Gather(collectives)
    for module in (model, *sharded):
        if _groups(module):
            module.set_custom_all_gather(gather)
    return model


def _narrow_gathered(layer: FSDPModule, dtype: torch.dtype) -> None:
    """Gather a layer's matrices in the dtype in which autocast multiplies with them: fewer bytes, equal products.

    FSDP2's MixedPrecisionPolicy has one dtype for a group, which would include the norms.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for group in _groups(layer):
        for parameter in group.fsdp_params:
            if parameter.sharded_param.dim() == 2:
                parameter.init_dtype_attrs = partial(_init_as, parameter.init_dtype_attrs, policy)


def _init_as(init: Callable[[MixedPrecisionPolicy], None], own: MixedPrecisionPolicy, _: MixedPrecisionPolicy) -> None:
    init(own)


def is_sharded(model: nn.Module) -> bool:
    """True if forwards gather parameters: sharded by FSDP2, or by DeepSpeed's ZeRO, which marks its parameters."""
    is_zero = any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())
    return is_zero or any(isinstance(module, FSDPModule) for module in model.modules())


def _prefetch(model: nn.Module, sharded: Sequence[nn.Module], last: nn.Module) -> None:
    """Gather each layer while the one before it runs, and the first one while the head runs, for the next step.

    The gathers are asynchronous; FSDP2 then frees their buffers right after the copy-out, so at most two layers are
    gathered.
    """
    model._set_unshard_async_op(True)
    for layer, following in pairwise(sharded):
        layer.set_modules_to_forward_prefetch([following])
    last.register_forward_hook(lambda *_: sharded[0].unshard(async_op=True) and None)


class _Gather(AllGather):
    """FSDP2's all-gather through other collectives than those of the process group."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: ProcessGroup, async_op: bool = False
    ) -> Work:
        self.collectives.gather(output_tensor, input_tensor)
        return _Done()


class _Done(Work):
    """A finished gather as a Work object, which makes FSDP2 free the buffer after the copy."""

    def wait(self, timeout: object = None) -> bool:
        return True


@torch.inference_mode()
def reshard(model: nn.Module) -> None:
    """Free everything gathered: afterwards a rank holds only its shards, until the next forward."""
    if (shared := getattr(model, "shared_layers", None)) is not None:
        shared.give_back()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if any(group._all_gather_result for group in _groups(module)):
                module.unshard()  # completes a gather in progress
            module.reshard()


def reset_bookkeeping(model: nn.Module) -> None:
    """Drop FSDP2's record of forwards since the last call, which it keeps for a backward that never comes.

    Only between forwards. The record holds no parameter, so resident layers stay resident.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _groups(module):
                group.comm_ctx.post_forward_order.clear()
                group._post_forward_indices.clear()


def bookkeeping_entries(model: nn.Module) -> int:
    """The number of forwards that FSDP2 has recorded since the last reset, over all groups."""
    return sum(
        len(group._post_forward_indices)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in _groups(module)
    )


def _groups(module: FSDPModule) -> list[Any]:
    """The parameter groups of one sharded module, by the attribute that this version of torch has (2.10 had one
    group)."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []
