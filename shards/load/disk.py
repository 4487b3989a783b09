"""Weights that stay in their files: read when they are used, and not kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from shards.checkpoint.checkpoint import Checkpoint
from shards.checkpoint.open_files import OpenFiles
from shards.load.blocks import stored_tensors
from shards.load.conversion import part_targets
from shards.load.load import match_tensors
from shards.load.meta import materialize_buffers
from shards.load.slices import read_targets
from shards.load.torch_files import read_torch_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from shards.load.adapter import Adapter


class StoredWeights(Mapping[str, torch.Tensor]):
    """The parameters of a model on meta by name (tied ones by all of their names), read again at each access, in the
    model's dtype."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, adapter: Adapter | None = None) -> None:
        if checkpoint.legacy and not checkpoint.tensors:
            checkpoint = Checkpoint.open(checkpoint.folder, read_torch_file)
        self.checkpoint, self.adapter = checkpoint, adapter
        self.matched = match_tensors(model, checkpoint)
        stored = dict(stored_tensors(model))
        first = {id(tensor): name for name, tensor in stored.items()}
        everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.tensors = {name: (first[id(tensor)], tensor) for name, tensor in everything if id(tensor) in first}
        if adapter is not None:
            adapter.check({name: tuple(tensor.shape) for name, tensor in stored.items()})

    @property
    def files(self) -> frozenset[Path]:
        """The files that contain the values."""
        entries = (entry for entries in self.matched.values() for entry in entries[:1])
        return frozenset(part.file for entry in entries for part in entry.stored)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored, like = self.tensors[name]
        values = torch.empty(like.shape, dtype=like.dtype)
        start, entry = (0,) * values.dim(), self.matched[stored][0]
        with OpenFiles(self.checkpoint) as files:
            read_targets(files, list(part_targets(entry, start, values)))
        if self.adapter is not None:
            self.adapter.add(stored, start, values)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def leave_on_disk(
    model: nn.Module, checkpoint: Checkpoint, device: torch.device, adapter: Adapter | None = None
) -> StoredWeights:
    """The weights of a model on meta, whose parameters stay there; its buffers are loaded onto `device`."""
    weights = StoredWeights(model, checkpoint, adapter)
    for module in model.modules():
        materialize_buffers(model, module, device)
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
    return weights
