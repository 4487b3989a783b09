"""The part of a model that a rank holds: its parameters and buffers as blocks of the uncut tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn


@dataclass(frozen=True, slots=True)
class Block:
    """The block of the uncut model that a plain tensor holds: it begins at `start` in the parameter `name`, which has
    the shape `shape`."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]


def mark_block(tensor: torch.Tensor, block: Block) -> None:
    """Mark on a plain tensor which block of the model it is, for engines that cut a model in their own way."""
    tensor.block = block


def mark_parts(tensor: torch.Tensor, parts: Sequence[tuple[Block, int]]) -> None:
    """Mark on a plain tensor that it consists of several blocks of the model, stacked by rows, with the rows of
    each."""
    tensor.parts = tuple(parts)


def copy_marks(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy the marks of one tensor to another."""
    for name in ("block", "parts"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


def block_of(tensor: torch.Tensor) -> Block | None:
    """The mark of `mark_block`, if there is one."""
    block: Block | None = getattr(tensor, "block", None)
    return block


def whole(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Name and shape of a tensor in the uncut model."""
    block = block_of(tensor)
    if block is None:
        return name, tuple(tensor.shape)
    return block.name, block.shape


def local_block(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor]:
    """The local part of a tensor, and its start in the whole tensor."""
    if not isinstance(tensor, DTensor):
        block = block_of(tensor)
        if block is None:
            return (0,) * tensor.dim(), tensor.detach()
        return block.start, tensor.detach()
    local = local_tensor(tensor)
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape) == tuple(local.shape), f"local shape {tuple(local.shape)}, by its placement {tuple(shape)}"
    return tuple(start), local


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The local part of a tensor: the shard of a DTensor, the partition of a ZeRO parameter, or a plain tensor
    itself."""
    with torch.no_grad():
        tensor = getattr(tensor, "ds_tensor", tensor)
        local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach()


def local_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that this rank holds; tied ones count once."""
    return sum(local_tensor(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by name, each once. A tensor that consists of several blocks is replaced by
    these, and a packed matrix by its `weight`."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith("weight_"):
            continue  # scales and adapter factors are filled separately
        first = 0
        for block, rows in getattr(parameter, "parts", ()):
            part = parameter.detach().narrow(0, first, rows)
            mark_block(part, block)
            yield block.name, part
            first += rows
        if not first:
            yield name, parameter
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer
