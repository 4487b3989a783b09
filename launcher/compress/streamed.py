"""Compress a checkpoint in this process, one decoder layer at a time, and write each layer as soon as it is done."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from launcher.compress.gradients import importance
from launcher.compress.request import group_of
from launcher.config.schema import ConfigError
from shards.model.shape import layer_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from launcher.compress.request import Request
    from shards.checkpoint.checkpoint import Checkpoint
    from shards.model.shape import Parameter

Tensors = dict[str, torch.Tensor]
SHARD_BYTES = 2 << 30
COLUMNS_TOGETHER = 64
"""If the number of inner columns is a multiple of this, it stays one, for whole groups of quantized weights and
efficient kernels."""


class Writer:
    """Writes tensors into .safetensors files of about 2 GB, with their index."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.waiting, self.files = folder, Tensors(), 0
        self.weight_map: dict[str, str] = {}
        self.total = self.zeros = self.values = 0

    def add(self, tensors: Tensors) -> None:
        self.waiting |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self.waiting.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        self.files += 1
        name = f"model-{self.files:05d}.safetensors"
        save_file(self.waiting, self.folder / name, {"format": "pt"})
        self.weight_map |= dict.fromkeys(self.waiting, name)
        self.total += sum(tensor.nbytes for tensor in self.waiting.values())
        self.waiting = {}

    def close(self, config: dict[str, Any]) -> None:
        self.flush()
        index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        (self.folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_compressed(
    request: Request, checkpoint: Checkpoint, chosen: dict[str, Parameter], config: dict[str, Any], folder: Path
) -> str:
    """Write the compressed checkpoint into a folder; returns a line about the result."""
    writer, before = Writer(folder), 0
    new_config = dict(config)
    scores: Tensors | None = None
    if request.method == "llm_pruner":
        assert request.prompts is not None
        scores = importance(checkpoint, chosen, request.prompts)
    for tensors in by_layer(checkpoint):
        before += sum(tensor.nbytes for tensor in tensors.values())
        inside = {name: tensor for name, tensor in tensors.items() if name in chosen}
        if not inside:
            writer.add(tensors)
        elif request.method == "magnitude":
            sparse = {name: pruned(tensor, request.ratio, request.pattern) for name, tensor in inside.items()}
            writer.values += sum(tensor.numel() for tensor in sparse.values())
            writer.zeros += sum(int((tensor == 0).sum()) for tensor in sparse.values())
            writer.add(tensors | sparse)
        elif request.method == "rtn":
            rest = {name: tensor for name, tensor in tensors.items() if name not in inside}
            parts = [rounded(name, tensor, request.scheme, group(chosen)) for name, tensor in inside.items()]
            writer.add(rest | {name: tensor for part in parts for name, tensor in part.items()})
        else:
            by_weight = scores or {name: tensor.float().square() for name, tensor in inside.items()}
            smaller, changes = narrowed(tensors, by_weight, config, request.ratio)
            new_config |= changes
            writer.add(smaller)
    if request.method == "rtn":
        new_config["quantization_config"] = quantization_config(request.scheme, group(chosen))
    writer.close(new_config)
    line = f"{before / 1e6:,.1f} MB -> {writer.total / 1e6:,.1f} MB"
    if not writer.values:
        return line
    return f"{line}, {writer.zeros / writer.values:.1%} of the values of the layers are zeros"


def by_layer(checkpoint: Checkpoint) -> Iterator[Tensors]:
    """The tensors of a checkpoint, grouped by decoder layer."""
    groups: dict[int | None, list[str]] = {}
    for name in checkpoint.tensors:
        groups.setdefault(layer_of(name), []).append(name)
    for names in groups.values():
        tensors = {}
        for name in names:
            with safe_open(str(checkpoint.tensors[name].file), "pt") as file:
                tensors[name] = file.get_tensor(name)
        yield tensors


def group(chosen: dict[str, Parameter]) -> int:
    """The number of inputs that share a scale, in all matrices."""
    return group_of(*{parameter.shape[1] for parameter in chosen.values()}) or 0


def pruned(weight: torch.Tensor, ratio: float, pattern: str) -> torch.Tensor:
    """The matrix with its smallest values replaced by zeros: a share of the whole matrix, or two of every four values
    in a row."""
    size = weight.float().abs()
    if pattern == "2:4":
        fours = size.view(len(size), -1, 4)
        least = fours.argsort(-1)[..., :2]
        return weight.masked_fill(torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, least, True).view_as(size), 0)
    count = round(ratio * size.numel())
    if not count:
        return weight
    least = size.flatten().argsort()[:count]
    return weight.flatten().index_fill(0, least, 0).view_as(weight)


def rounded(name: str, weight: torch.Tensor, scheme: str, group: int) -> Tensors:
    """The tensors of a matrix in the format of compressed-tensors, with values rounded to nearest."""
    prefix, values = name.removesuffix("weight"), weight.float()
    if scheme == "w8a8":
        scale = (values.abs().amax(1, keepdim=True) / 127.5).clamp_(min=torch.finfo(torch.float32).tiny)
        integers = (values / scale).round().clamp_(-128, 127).to(torch.int8)
        return {f"{prefix}weight": integers, f"{prefix}weight_scale": scale.to(weight.dtype)}
    groups = values.view(len(values), -1, group)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp_(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
    integers = ((groups / scale.float()).round().clamp_(-8, 7) + 8).long().view(len(values), -1, 8)
    words = sum(integers[..., place] << (4 * place) for place in range(8))
    assert isinstance(words, torch.Tensor)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return {
        f"{prefix}weight_packed": signed,
        f"{prefix}weight_scale": scale[..., 0],
        f"{prefix}weight_shape": torch.tensor(weight.shape),
    }


def quantization_config(scheme: str, group: int) -> dict[str, Any]:
    """The description of a scheme in the format of compressed-tensors."""
    weights: dict[str, Any] = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
    }
    inputs, kind = None, "pack-quantized"
    if scheme == "w8a8":
        kind = "int-quantized"
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    linear = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": kind}
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
        "config_groups": {"group_0": linear}, "ignore": ["lm_head"],
    }  # fmt: skip


def narrowed(tensors: Tensors, scores: Tensors, config: dict[str, Any], ratio: float) -> tuple[Tensors, dict[str, int]]:
    """The tensors of a decoder layer without the inner columns and heads that have the lowest scores (summed over
    coupled weights), and the changed values of the config."""
    leaves = {".".join(name.split(".")[-3:]): name for name in tensors}
    smaller = dict(tensors)
    if "mlp.dense_h_to_4h.weight" in leaves:
        columns = _strongest(scores, leaves, ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", 1, ratio)
        _cut(smaller, leaves, ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", columns)
        return smaller, {"ffn_hidden_size": len(columns)}
    if "mlp.gate_proj.weight" not in leaves:
        raise ConfigError("Structured pruning knows the layers of Falcon and of Llama only.", "method=magnitude")
    inward = ("mlp.gate_proj", "mlp.up_proj")
    columns = _strongest(scores, leaves, inward, "mlp.down_proj", 1, ratio)
    _cut(smaller, leaves, inward, "mlp.down_proj", columns)
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    heads_each = config["num_attention_heads"] // kv_heads
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    queries = ("self_attn.q_proj",)
    hidden = config["hidden_size"] // heads_each  # transformers requires a multiple of the heads
    kept = _strongest(scores, leaves, queries, "self_attn.o_proj", heads_each * width, ratio, hidden)
    _cut(smaller, leaves, queries, "self_attn.o_proj", kept, heads_each * width)
    _cut(smaller, leaves, ("self_attn.k_proj", "self_attn.v_proj"), None, kept, width)
    return smaller, {
        "intermediate_size": len(columns), "num_key_value_heads": len(kept), "head_dim": width,
        "num_attention_heads": len(kept) * heads_each,
    }  # fmt: skip


def _strongest(
    scores: Tensors,
    leaves: dict[str, str],
    inward: tuple[str, ...],
    outward: str,
    unit: int,
    ratio: float,
    multiple_of: int | None = None,
) -> torch.Tensor:
    """The indices of the units to keep, in order; a unit is `unit` rows of the inward matrices and `unit` columns of
    the outward one.

    Their number is rounded up to a divisor of `multiple_of`, if that is given.
    """
    strength = scores[leaves[f"{outward}.weight"]].sum(0).view(-1, unit).sum(1)
    for name in inward:
        strength = strength + scores[leaves[f"{name}.weight"]].sum(1).view(-1, unit).sum(1)
    left = max(1, round((1 - ratio) * len(strength)))
    if unit == 1 and len(strength) % COLUMNS_TOGETHER == 0:
        left = max(COLUMNS_TOGETHER, round(left / COLUMNS_TOGETHER) * COLUMNS_TOGETHER)
    while multiple_of and left < len(strength) and multiple_of % left:
        left += 1
    return strength.argsort(descending=True)[:left].sort().values


def _cut(
    tensors: Tensors,
    leaves: dict[str, str],
    inward: tuple[str, ...],
    outward: str | None,
    units: torch.Tensor,
    unit: int = 1,
) -> None:
    rows = (units[:, None] * unit + torch.arange(unit)).flatten()
    for name in inward:
        for leaf in ("weight", "bias"):
            if (key := leaves.get(f"{name}.{leaf}")) is not None:
                tensors[key] = tensors[key][rows]
    if outward is not None:
        tensors[leaves[f"{outward}.weight"]] = tensors[leaves[f"{outward}.weight"]][:, rows]
