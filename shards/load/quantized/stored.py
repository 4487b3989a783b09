"""Matrices of checkpoints that are already quantized: read as they are stored, and kept in the layout of a
quantizer."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from shards.checkpoint.tensor_files import TensorEntry
from shards.errors import CheckpointError
from shards.load.blocks import local_block, local_tensor
from shards.load.quantized.integer_quantizers import GroupsInt4, packed_int4
from shards.load.quantized.quantizers import make_quantizer, part_shape, whole_shape
from shards.load.quantized.slabs import SCALES, Slab, Span, check_shapes, slabs_of
from shards.load.quantized.widened_quantizers import BytesFp8, GroupIntegers
from shards.load.slices import TORCH_DTYPES, Target, read_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from shards.checkpoint.checkpoint import Checkpoint
    from shards.checkpoint.open_files import OpenFiles
    from shards.load.quantized.quantizers import Quantizer
    from shards.model.quantization import Quantization

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The positions of the values of eight outputs in a word of AWQ."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StoredMatrix(TensorEntry):
    """A matrix that is stored as several tensors, by their suffix after the layer's name. File and offset are those of
    the first."""

    parts: tuple[tuple[str, TensorEntry], ...]


def make_stored(form: Quantization, dtype: torch.dtype, zeros_from: int) -> Quantizer:
    """The quantizer that keeps matrices as a checkpoint stores them; GPTQ's zero points are offset by `zeros_from`."""
    quantizer: Quantizer
    if form.unpacks and not form.flat:
        quantizer = BytesFp8(form, dtype)
        if form.scales == 2:
            quantizer = GroupIntegers(form, dtype)
    elif form.scales == 2:
        quantizer = make_quantizer("int4_wo", dtype)
    else:
        quantizer = make_quantizer({"int8_channel": "int8_dyn"}.get(form.name, form.name), dtype)
    if isinstance(quantizer, GroupsInt4):
        quantizer.group = form.block[1]
    quantizer.form, quantizer.zeros_from = form, zeros_from
    return quantizer


def with_stored(checkpoint: Checkpoint, layers: Mapping[str, nn.Module]) -> Checkpoint:
    """The checkpoint with a StoredMatrix for each layer whose quantizer keeps the stored form."""
    prefixes = {name.removesuffix("weight"): name for name, layer in layers.items() if layer.quantizer.form}
    tensors: dict[str, TensorEntry] = {}
    parts: dict[str, list[tuple[str, TensorEntry]]] = {}
    for name, entry in checkpoint.tensors.items():
        words = name.split(".")
        candidates = (".".join(words[:count]) + "." for count in range(len(words) - 1, 0, -1))
        prefix = next((candidate for candidate in candidates if candidate in prefixes), None)
        if prefix is None or name == f"{prefix}bias":
            tensors[name] = entry
        else:
            parts.setdefault(prefix, []).append((name.removeprefix(prefix), entry))
    for prefix, found in parts.items():
        first, name = found[0][1], prefixes[prefix]
        nbytes, shape = sum(entry.nbytes for _, entry in found), whole_shape(layers[name])
        tensors[name] = StoredMatrix(name, first.file, "BF16", shape, first.offset, nbytes, tuple(found))
    return replace(checkpoint, tensors=tensors)


def read_stored(
    files: OpenFiles,
    entries: Mapping[str, TensorEntry],
    layers: Mapping[str, nn.Module],
    progress: Callable[[int], None],
) -> tuple[int, float]:
    """Read the matrices of layers, one after the other, into their quantizers. Returns the bytes read, and the seconds
    spent on unpacking."""
    bytes_read, unpack_s = 0, 0.0
    for name, layer in layers.items():
        entry, form = entries[name], layer.quantizer.form
        assert isinstance(entry, StoredMatrix)
        (row, column), device = local_block(layer.weight)[0], local_tensor(layer.weight).device
        (outputs, inputs), (rows, columns) = whole_shape(layer), part_shape(layer)
        parts = dict(entry.parts)
        slabs = slabs_of(form, Span(outputs, row, rows), Span(inputs, column, columns))
        check_shapes(name, form, parts, slabs)
        tensors, targets = {}, []
        for leaf, stored in parts.items():
            part = slabs.get(leaf) or Slab(stored.shape, (0,) * len(stored.shape), stored.shape)
            tensors[leaf] = torch.empty(part.sizes, dtype=TORCH_DTYPES[stored.dtype], device=device)
            targets.append(Target(replace(stored, shape=part.shape), part.start, tensors[leaf]))
        bytes_read += read_targets(files, targets)
        began = time.perf_counter()
        try:
            _keep(layer, tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{entry.file} has no {form.name} for {name}: {error}.",
                "the checkpoint is damaged, or not what its quantization_config says: fetch it again",
            ) from error
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        unpack_s += time.perf_counter() - began
        progress(bytes_read)
    return bytes_read, unpack_s


def _keep(layer: nn.Module, tensors: Tensors) -> None:
    """Store the tensors of a matrix in the parameters of its layer."""
    quantizer, name = layer.quantizer, layer.quantizer.form.name
    weight, scale = local_tensor(layer.weight), local_tensor(getattr(layer, "weight_scale", layer.weight))
    if quantizer.form.scales == 2:
        if name.startswith("gptq"):
            words, scales, zeros = _gptq(tensors, quantizer)
        elif name.startswith("awq"):
            words, scales, zeros = _awq(tensors)
        else:
            words, scales, zeros = _compressed(tensors, quantizer.form.bits)
        middle = ((1 << (quantizer.form.bits - 1)) - zeros) * scales.float()
        pairs = torch.stack([scales.float(), middle], -1)
        if isinstance(quantizer, GroupsInt4):
            weight.copy_(packed_int4(nibbles(words)).view(weight.shape))
            scale.copy_(pairs.transpose(0, 1))
        else:
            weight.copy_(words.view(torch.uint8)[:, : weight.shape[1]])
            scale.copy_(pairs)
            if quantizer.form.ordered:
                layer.weight_group.copy_(tensors["g_idx" if "g_idx" in tensors else "weight_g_idx"])
    elif isinstance(quantizer, BytesFp8):
        weight.copy_(tensors["weight"].view(torch.uint8))
        scale.copy_(next(tensors[leaf] for leaf in SCALES if leaf in tensors))
    elif name in ("int8_channel", "int8"):
        weight.copy_(tensors["weight"])
        scale.copy_(tensors["SCB" if name == "int8" else "weight_scale"].view(-1))
    else:
        _keep_four_bits(layer, tensors)


def nibbles(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The unsigned integers of `bits` bits in each word, lowest bits first: [..., n] -> [..., 32 / bits * n]."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _gptq(tensors: Tensors, quantizer: Quantizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words of integers [outputs, words]; scales and zero points [outputs, groups]."""
    assert quantizer.form is not None
    scales, bits = tensors["scales"].t(), quantizer.form.bits
    order, group = tensors.get("g_idx"), quantizer.form.block[1]
    if order is not None and not quantizer.form.ordered and group:
        first = order[:1].cpu().long()
        if not torch.equal(order.cpu().long(), first + torch.arange(len(order)) // group):
            raise ValueError("its inputs are reordered (desc_act)")
    # Zero points are stored minus `zeros_from`. It is added to whole words, as in gptqmodel: a zero point of 0 borrowed
    # from the next one when it was stored.
    one_each = ((1 << 32) - 1) // ((1 << bits) - 1)
    zeros = nibbles(tensors["qzeros"] + quantizer.zeros_from * one_each, bits).t()
    return tensors["qweight"].t().contiguous(), scales, zeros


def _awq(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def in_order(words: torch.Tensor) -> torch.Tensor:
        return nibbles(words).view(len(words), -1, 8)[..., list(AWQ_ORDER)].flatten(1).t()

    integers = in_order(tensors["qweight"])
    return as_words(integers), tensors["scales"].t(), in_order(tensors["qzeros"])


def as_words(integers: torch.Tensor) -> torch.Tensor:
    """Integers of four bits, packed eight to a word along the rows, the first in the lowest bits."""
    halves = integers[:, ::2] | integers[:, 1::2] << 4
    return halves.to(torch.uint8).contiguous().view(torch.int32)


def _compressed(tensors: Tensors, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = tensors["weight_scale"]
    zeros = torch.full_like(scales, 1 << (bits - 1))
    if "weight_zero_point" in tensors:
        zeros = nibbles(tensors["weight_zero_point"].t(), bits).t()
    return tensors["weight_packed"], scales, zeros


def _keep_four_bits(layer: nn.Module, tensors: Tensors) -> None:
    for name, leaf in (("weight", "weight"), ("weight_absmax", "weight.absmax")):
        kept = local_tensor(getattr(layer, name))
        kept.copy_(tensors[leaf].view(kept.shape))
    layer.weight_code.copy_(tensors["weight.quant_map"])
    if layer.quantizer.is_nested:
        state = next(tensor for leaf, tensor in tensors.items() if leaf.startswith("weight.quant_state."))
        fields: dict[str, Any] = json.loads(bytes(state.cpu().tolist()))
        layer.weight_nested_absmax.copy_(tensors["weight.nested_absmax"])
        layer.weight_nested_code.copy_(tensors["weight.nested_quant_map"])
        layer.weight_offset.fill_(fields["nested_offset"])
