"""The tensors of a pytorch_model.bin: torch reads its index, and runs no pickled code."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shards.checkpoint.archives import check_archive, no_state_dict
from shards.checkpoint.tensor_files import TensorEntry
from shards.load.slices import TORCH_DTYPES

if TYPE_CHECKING:
    from pathlib import Path

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MALFORMED = (
    pickle.UnpicklingError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, EOFError,
    OverflowError, MemoryError,
)  # fmt: skip
"""Exceptions that torch raises for an index that it did not write."""


def read_torch_file(path: Path) -> list[TensorEntry]:
    """The tensors of a state dict saved by torch.save (torch >= 1.6), from its index alone; CheckpointError for another
    file.

    Tied tensors share their bytes.
    """
    check_archive(path)
    try:
        with FakeTensorMode():  # tensors without memory, each of which knows where its bytes are
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MALFORMED as error:
        # Keep the fault in torch's message, but not its advice to load the file anyway.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        faults = (line for line in lines if line.startswith(("Unsupported", "WeightsUnpickler error")))
        fault = next(faults, "").removeprefix("WeightsUnpickler error: ")
        raise no_state_dict(path, fault or lines[0]) from None
    if not isinstance(state, dict):
        raise no_state_dict(path, f"it is a {type(state).__name__}")
    size = path.stat().st_size
    return [_entry(path, name, value, size) for name, value in state.items()]


def _entry(path: Path, name: Any, value: Any, size: int) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise no_state_dict(path, f"{name} is a {type(value).__name__}")
    if value.layout != torch.strided or value.dtype not in DTYPE_NAMES:
        raise no_state_dict(path, f"{name} is a tensor of {value.dtype}, {value.layout}")
    if not value.is_contiguous():
        raise no_state_dict(path, f"{name} is not stored row by row")
    storage = value.untyped_storage()
    begin = value.storage_offset() * value.itemsize
    if storage._checkpoint_offset is None or begin + value.nbytes > storage.nbytes():
        raise no_state_dict(path, f"{name} takes {begin + value.nbytes:,} bytes of a storage of {storage.nbytes():,}")
    offset = storage._checkpoint_offset + begin
    if offset + value.nbytes > size:
        raise no_state_dict(path, f"{name} ends at byte {offset + value.nbytes:,} of a file of {size:,}")
    return TensorEntry(name, path, DTYPE_NAMES[value.dtype], tuple(value.shape), offset, value.nbytes)
