"""Matrices of checkpoints that are quantized already: read as they are stored, and kept in the form of a quantizer."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from shards.checkpoint.tensor_files import TensorEntry
from shards.errors import CheckpointError
from shards.load.integer_quantizers import packed_int4
from shards.load.quantizers import make_quantizer, whole_shape
from shards.load.slices import TORCH_DTYPES, Target, read_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from shards.checkpoint.checkpoint import Checkpoint
    from shards.checkpoint.open_files import OpenFiles
    from shards.load.quantizers import Quantizer
    from shards.model.quantization import Quantization

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ the value of each of eight outputs is."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StoredMatrix(TensorEntry):
    """A matrix that is stored as several tensors, by what their names add to that of its layer. File and offset are
    those of the first."""

    parts: tuple[tuple[str, TensorEntry], ...]


def make_stored(stored: Quantization, dtype: torch.dtype, zeros_from: int) -> Quantizer:
    """The quantizer that keeps matrices as a checkpoint has them; GPTQ's zero points begin at `zeros_from`."""
    kind = "int4_wo" if stored.scales == 2 else "int8_dyn" if stored.name == "int8_channel" else stored.name
    quantizer = make_quantizer(kind, dtype)
    if stored.scales == 2:
        quantizer.group = stored.block[1]  # type: ignore[attr-defined]
    quantizer.stored, quantizer.zeros_from = stored.name, zeros_from
    return quantizer


def with_stored(checkpoint: Checkpoint, layers: Mapping[str, nn.Module]) -> Checkpoint:
    """The checkpoint with the matrices of layers whose quantizers keep what is stored as StoredMatrix."""
    prefixes = {name.removesuffix("weight"): name for name, layer in layers.items() if layer.quantizer.stored}
    tensors: dict[str, TensorEntry] = {}
    parts: dict[str, list[tuple[str, TensorEntry]]] = {}
    for name, entry in checkpoint.tensors.items():
        prefix = next((prefix for prefix in _beginnings(name) if prefix in prefixes), None)
        if prefix is None or name == f"{prefix}bias":
            tensors[name] = entry
        else:
            parts.setdefault(prefix, []).append((name.removeprefix(prefix), entry))
    for prefix, found in parts.items():
        first, name = found[0][1], prefixes[prefix]
        nbytes, shape = sum(entry.nbytes for _, entry in found), whole_shape(layers[name])
        tensors[name] = StoredMatrix(name, first.file, "BF16", shape, first.offset, nbytes, tuple(found))
    return replace(checkpoint, tensors=tensors)


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) + "." for count in range(len(parts) - 1, 0, -1)]


def read_stored(
    files: OpenFiles,
    entries: Mapping[str, TensorEntry],
    layers: Mapping[str, nn.Module],
    progress: Callable[[int], None],
) -> tuple[int, float]:
    """Read the matrices of layers, one after the other, into their quantizers: the bytes read, and the seconds that it
    took to unpack them."""
    bytes_read, unpack_s = 0, 0.0
    for name, layer in layers.items():
        entry = entries[name]
        assert isinstance(entry, StoredMatrix)
        device = layer.weight.device
        tensors = {
            leaf: torch.empty(part.shape, dtype=TORCH_DTYPES[part.dtype], device=device) for leaf, part in entry.parts
        }
        targets = [Target(part, (0,) * len(part.shape), tensors[leaf]) for leaf, part in entry.parts]
        bytes_read += read_targets(files, targets)
        began = time.perf_counter()
        try:
            _keep(layer, tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{entry.file} has no {layer.quantizer.stored} for {name}: {error}.",
                "the checkpoint is damaged, or not what its quantization_config says: fetch it again",
            ) from error
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        unpack_s += time.perf_counter() - began
        progress(bytes_read)
    return bytes_read, unpack_s


def _keep(layer: nn.Module, tensors: Tensors) -> None:
    name = layer.quantizer.stored
    if name.startswith("gptq"):
        _keep_groups(layer, *_gptq(tensors, layer.quantizer.zeros_from))
    elif name.startswith("awq"):
        _keep_groups(layer, *_awq(tensors))
    elif name.startswith("int4"):
        _keep_groups(layer, *_compressed(tensors))
    elif name == "int8_channel":
        layer.weight.copy_(tensors["weight"])
        layer.weight_scale.copy_(tensors["weight_scale"].view(-1))
    elif name == "int8":
        layer.weight.copy_(tensors["weight"])
        layer.weight_scale.copy_(tensors["SCB"])
    else:
        _keep_four_bits(layer, tensors)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """Eight integers of four bits for each word, the lowest bits first: [..., n] -> [..., 8 n]."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2)


def _gptq(tensors: Tensors, zeros_from: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers [outputs, inputs]; scales and zero points [outputs, groups]."""
    integers, scales = nibbles(tensors["qweight"].t()), tensors["scales"].t()
    order = tensors.get("g_idx")
    if order is not None:
        group = integers.shape[1] // scales.shape[1]
        if not torch.equal(order.cpu().long(), torch.arange(len(order)) // group):
            raise ValueError("its inputs are reordered (desc_act)")
    return integers, scales, nibbles(tensors["qzeros"]).t() + zeros_from


def _awq(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def in_order(words: torch.Tensor) -> torch.Tensor:
        return nibbles(words).view(len(words), -1, 8)[..., list(AWQ_ORDER)].flatten(1).t()

    return in_order(tensors["qweight"]), tensors["scales"].t(), in_order(tensors["qzeros"])


def _compressed(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = tensors["weight_scale"]
    zeros = torch.full_like(scales, 8)
    if "weight_zero_point" in tensors:
        zeros = nibbles(tensors["weight_zero_point"].t()).t()
    return nibbles(tensors["weight_packed"]), scales, zeros


def _keep_groups(layer: nn.Module, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """Values are `(integer - zero) * scale`; the kernel's are `(integer - 8) * scale + middle`."""
    if tuple(integers.shape) != layer.packed_shape:
        raise ValueError(f"it has {' x '.join(map(str, integers.shape))} integers")
    scales = scales.float()
    middle = (8 - zeros) * scales
    layer.weight.copy_(packed_int4(integers.int().contiguous()).view(layer.weight.shape))
    layer.weight_scale.copy_(torch.stack([scales, middle], -1).transpose(0, 1))


def _keep_four_bits(layer: nn.Module, tensors: Tensors) -> None:
    layer.weight.copy_(tensors["weight"].view(layer.weight.shape))
    layer.weight_absmax.copy_(tensors["weight.absmax"].view(layer.weight_absmax.shape))
    layer.weight_code.copy_(tensors["weight.quant_map"])
    if layer.quantizer.is_nested:
        state = next(tensor for leaf, tensor in tensors.items() if leaf.startswith("weight.quant_state."))
        fields: dict[str, Any] = json.loads(bytes(state.cpu().tolist()))
        layer.weight_nested_absmax.copy_(tensors["weight.nested_absmax"])
        layer.weight_nested_code.copy_(tensors["weight.nested_quant_map"])
        layer.weight_offset.fill_(fields["nested_offset"])
