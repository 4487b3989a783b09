"""Random weights, made on the device that holds them; the values do not depend on the sharding."""

from __future__ import annotations

import hashlib
import math
import time
from typing import TYPE_CHECKING

import torch

from shards.load.blocks import local_block, local_bytes, stored_tensors, whole
from shards.load.load import LoadStats
from shards.load.meta import materialize
from shards.load.quantized.quantizers import packed_layers, part_of, whole_shape

if TYPE_CHECKING:
    from torch import nn

    from shards.load.slices import Progress

STD = 0.02  # as most causal LMs are initialised: logits spread over a few units at any hidden size
BLOCK_ELEMENTS = 1 << 20


def fill_random(
    model: nn.Module,
    seed: int,
    device: torch.device | str,
    progress: Progress = lambda done, total: None,
) -> LoadStats:
    """Fill every parameter of a model on meta, plain or DTensor, with its local part of a random tensor on `device`.

    A value depends on the seed, the name of the parameter, its position in the whole tensor and the kind of device, not
    on the sharding. Matrices are normal with standard deviation 0.02, biases 0, vectors (norms) 1. Temporaries never
    exceed one block of 2**20 elements, or one row if that is longer.
    """
    began = time.perf_counter()
    materialize(model, device)
    tensors, packed = dict(stored_tensors(model)), packed_layers(model)
    total, done = sum(local_block(tensor)[1].nbytes for tensor in tensors.values()), 0
    on_card, quantize_s, fill_began = torch.device(device).type == "cuda", 0.0, time.perf_counter()
    with torch.no_grad():
        for name, tensor in tensors.items():
            uncut, shape = whole(name, tensor)
            layer = packed.get(uncut)
            if layer is None:
                _fill(uncut, shape, *local_block(tensor), seed)
            else:
                start, local = part_of(layer)
                _fill(uncut, whole_shape(layer), start, local, seed)
                quantize_s += _timed_pack(layer, local)
            done += local_block(tensor)[1].nbytes
            progress(done, total)
    if on_card:
        torch.cuda.synchronize(device)
    ended = time.perf_counter()
    return LoadStats(0, local_bytes(model), ended - began, ended - fill_began - quantize_s, quantize_s)


def _timed_pack(layer: nn.Module, values: torch.Tensor) -> float:
    """Pack the values of a layer; returns the seconds that it took, on a GPU until the GPU has finished."""
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
    began = time.perf_counter()
    layer.quantizer.pack(layer, values)
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - began


def _fill(name: str, shape: tuple[int, ...], start: tuple[int, ...], local: torch.Tensor, seed: int) -> None:
    """Fill the part of a tensor that begins at `start`.

    Whole matrices are made in blocks of rows, each from its own seed; `local` takes its part of them.
    """
    if name.endswith("bias") or not local.is_floating_point():
        local.zero_()
        return
    if len(shape) < 2:
        local.fill_(1)
        return
    if not local.numel():
        return
    rows = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    begin, end = start[0], start[0] + local.shape[0]
    for block in range(begin // rows, math.ceil(end / rows)):
        first, last = block * rows, min(shape[0], (block + 1) * rows)
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator(local.device).manual_seed(int.from_bytes(digest, "big") >> 1)
        values = torch.empty((last - first, *shape[1:]), dtype=torch.float32, device=local.device)
        values.normal_(0.0, STD, generator=generator)
        for dim in range(1, len(shape)):
            values = values.narrow(dim, start[dim], local.shape[dim])
        low, high = max(begin, first), min(end, last)
        local[low - begin : high - begin].copy_(values[low - first : high - first])
