"""Sharded layers gathered in the shared memory of one node: no rank copies what it reads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shards.load.blocks import local_block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shards.parallel.collectives import Collectives

ALIGNMENT = 64  # bytes of a CPU cache line


class SharedLayers:
    """Layers that FSDP2 has sharded, each gathered before its forward without FSDP2: every rank writes its rows of each
    parameter into shared memory and waits for the others, and all read the whole there.

    The two halves of `room` are used in turn: once all ranks have written a layer, none still reads the previous layer,
    whose half the next layer takes. From a forward until `give_back` the parameters of the layers are views of the
    room, valid while their layer runs. Matrices are gathered in `gather_dtype`, if given. Every forward of the model
    must run all layers in order.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        room: torch.Tensor,
        meet: Callable[[], object],
        gather_dtype: torch.dtype | None,
    ) -> None:
        self.layers, self.halves, self.meet, self.gather_dtype = layers, room.view(2, -1), meet, gather_dtype
        self.sharded: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.copies: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []  # (into, from) for each layer
        for number, layer in enumerate(layers):
            state: Any = layer._get_fsdp_state()
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
            layer.register_forward_pre_hook(partial(self._gather, number))

    def _gather(self, number: int, *_: object) -> None:
        if not self.copies:
            with torch.inference_mode(mode=False), torch.no_grad():  # also used outside inference mode
                self._use_room()
        if number == 0:  # a rank may still read the last layer of the previous pass
            self.meet()
        places, shards = self.copies[number]
        torch._foreach_copy_(places, shards)
        self.meet()

    def _use_room(self) -> None:
        for number, layer in enumerate(self.layers):
            places, shards = [], []
            for (module, name, parameter), dtype, start, end in laid_out(layer, self.gather_dtype):
                whole = self.halves[number % 2, start:end].view(dtype).view(parameter.shape)
                (first, *_), shard = local_block(parameter)
                places.append(whole[first : first + len(shard)])
                shards.append(shard)
                self.sharded.append((module, name, parameter))
                setattr(module, name, nn.Parameter(whole, requires_grad=False))
            self.copies.append((places, shards))

    def give_back(self) -> None:
        """Make the parameters this rank's shards again."""
        for module, name, parameter in self.sharded:
            setattr(module, name, parameter)
        self.sharded.clear()
        self.copies.clear()


def share_layers(
    layers: Sequence[nn.Module], collectives: Collectives, gather_dtype: torch.dtype | None
) -> SharedLayers | None:
    """SharedLayers of the ranks of one node; None if shared memory has no room for two layers."""
    sizes = [0]
    for layer in layers:
        sizes.extend(end for *_, end in laid_out(layer, gather_dtype))
    room = collectives.room(2 * aligned(max(sizes)))
    if room is None:
        return None
    return SharedLayers(layers, room, collectives.meet, gather_dtype)


def laid_out(
    layer: nn.Module, gather_dtype: torch.dtype | None
) -> Iterator[tuple[tuple[nn.Module, str, nn.Parameter], torch.dtype, int, int]]:
    """Each sharded parameter of a layer with its module and name, the dtype it is gathered in, and the start and end of
    its bytes in the room."""
    end = 0
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue  # whole on each rank
            dtype = parameter.dtype
            if gather_dtype is not None and parameter.dim() == 2 and dtype.is_floating_point:
                dtype = gather_dtype
            start = aligned(end)
            end = start + parameter.numel() * dtype.itemsize
            yield (module, name, parameter), dtype, start, end


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
