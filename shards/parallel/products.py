"""Products of linear layers: weights packed for this CPU's kernels, and layers with the same input fused into one
product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers.models.falcon.modeling_falcon import FalconLinear

from shards.errors import PlanError
from shards.load.blocks import Block, block_of, mark_parts
from shards.load.quantized.quantizers import set_quantizer
from shards.parallel.fully_shard import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shards.load.quantized.quantizers import Quantizer

BATCH_HINT = 4  # oneDNN offers layouts for 1, 4 and 32 rows: this one is the fastest for 3 rows and more
LEAST_VALUES = {torch.float32: 1 << 18, torch.bfloat16: 1 << 14}
"""Matrices with at least this many values are faster packed: a call of oneDNN takes 12 us more than one of MKL."""

FUSED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
"""Layers with the same input in a Llama and its relatives, in the order in which they are called."""


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`rows` times the transposed `weight`, which may be packed, plus the bias."""
    if weight.layout is torch.strided:
        return linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")


class ProductLinear(nn.Linear):
    """A linear layer whose weight may be packed, for CPU kernels or by a quantizer."""

    quantizer: Quantizer | None = None
    lora_scale: float | None = None  # scale of an adapter's factors; None without an adapter

    def largest_over_ranks(self, largest: torch.Tensor) -> torch.Tensor:
        """The largest magnitudes of whole rows, from those of this rank's parts of the rows."""
        return largest

    def product(self, rows: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`rows` times the transposed weight, plus a bias and the output of an adapter's factors."""
        if self.quantizer is not None:
            products = self.quantizer.multiply(self, rows, bias)
        else:
            products = product(rows, self.weight, bias)
        if self.lora_scale is None:
            return products
        return products + linear(linear(rows, self.weight_lora_a), self.weight_lora_b) * self.lora_scale

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.product(rows, self.bias)


class FusedLinear(ProductLinear):
    """The first of several linear layers with the same input: computes the outputs of all, and stores those of the
    others."""

    sizes: list[int]
    left: list[torch.Tensor]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        first, *others = super().forward(rows).split(self.sizes, -1)
        self.left[:] = others[::-1]
        return first


class TakenLinear(nn.Module):
    """Another of the fused layers: returns the output that the first one has stored for it."""

    left: list[torch.Tensor]

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.left.pop()


def fuse_projections(model: nn.Module, least_values: int) -> int:
    """Fuse queries, keys and values, and gate and up, into one linear layer each, in place; returns the number of fused
    layers.

    The model is on meta, whole or cut for tensor parallelism; `shards.load.load` fills the fused weights from the
    tensors of the checkpoint. Layers of other classes, layers of which only some have a bias, and layers with fewer
    than `least_values` values together stay as they are.
    """
    fused = 0
    for name, module in list(model.named_modules()):
        for kind, names in FUSED:
            layers: list[Any] = [getattr(module, each, None) for each in names]
            if not name.endswith(kind) or any(type(layer) is not nn.Linear for layer in layers):
                continue
            is_alike = len({layer.bias is None for layer in layers}) == 1
            if is_alike and sum(layer.weight.numel() for layer in layers) >= least_values:
                _fuse(module, name, names, layers)
                fused += 1
    return fused


def _fuse(module: nn.Module, name: str, names: Sequence[str], layers: Sequence[nn.Linear]) -> None:
    first = layers[0]
    left: list[torch.Tensor] = []
    first.sizes = [layer.weight.shape[0] for layer in layers]
    for leaf in ("weight", "bias"):
        parts = [getattr(layer, leaf) for layer in layers]
        if parts[0] is None:
            continue
        blocks = [
            block_of(part) or Block(f"{name}.{each}.{leaf}", tuple(part.shape), (0,) * part.dim())
            for each, part in zip(names, parts, strict=True)
        ]
        joined = nn.Parameter(torch.cat(parts), requires_grad=False)
        mark_parts(joined, list(zip(blocks, first.sizes, strict=True)))
        setattr(first, leaf, joined)
    first.__class__ = FusedLinear
    first.left = left
    for each in names[1:]:
        taken = TakenLinear()
        taken.left = left
        setattr(module, each, taken)


def quantize_layers(
    model: nn.Module, quantizer: Quantizer, chooses: Callable[[str], bool] = lambda module: True
) -> None:
    """Let a quantizer store the matrices of the decoder layers, in place, except for modules whose name `chooses`
    rejects; embeddings and the head stay as they are.

    The model is on meta, whole or cut for tensor parallelism but not yet sharded. PlanError if matrices of its layers
    do not belong to linear layers.
    """
    layers = decoder_layers(model)
    inside = set(layers.modules())
    for name, module in model.named_modules():
        is_plain = type(module) in (nn.Linear, FalconLinear)
        if module not in inside or not chooses(name) or not (is_plain or isinstance(module, ProductLinear)):
            continue
        if is_plain:
            module.__class__ = ProductLinear
        set_quantizer(module, name, quantizer)
    for name, parameter in layers.named_parameters():
        owner = layers.get_submodule(name.rpartition(".")[0])
        is_left = parameter.dim() == 2 and name.endswith(".weight") and getattr(owner, "quantizer", None) is None
        if is_left and not isinstance(owner, nn.Linear):
            raise PlanError(
                f"{name} of a {type(model).__name__} is a {type(owner).__name__}, which is not quantized here.",
                "quantization=none",
            )


def least_packed(dtype: torch.dtype) -> int | None:
    """The fewest values of a matrix for which packing makes this CPU faster; None if it has no such kernels."""
    if not torch.backends.mkldnn.is_available() or dtype not in LEAST_VALUES:
        return None
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return LEAST_VALUES[dtype]


@torch.no_grad()
def pack_weights(model: nn.Module) -> int:
    """Pack the large matrices of linear layers on a CPU for its kernels, in place; returns their bytes.

    A packed weight has the same size and shape, but can only be multiplied with. A head that is tied to the embedding
    stays as it is, because an embedding needs its rows; so do sharded layers.
    """
    tied = model.get_input_embeddings().weight
    packed = 0
    for module in model.modules():
        is_plain = type(module) in (nn.Linear, FalconLinear)
        if not (is_plain or isinstance(module, ProductLinear)) or module.weight is tied:
            continue
        least = least_packed(module.weight.dtype)
        if isinstance(module.weight, DTensor) or least is None or module.weight.numel() < least:
            continue
        if is_plain:
            module.__class__ = ProductLinear
        weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), BATCH_HINT)
        module.weight = nn.Parameter(weight, requires_grad=False)
        packed += weight.nbytes
    return packed
