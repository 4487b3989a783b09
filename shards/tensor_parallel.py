"""The tensor-parallel cut as DTensors: attention by heads, MLP by columns and rows, the vocabulary by rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from shards.errors import PlanError
from shards.fully_shard import decoder_layers

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

_LLAMA = {
    "self_attn.q_proj": "column", "self_attn.k_proj": "column", "self_attn.v_proj": "column",
    "self_attn.o_proj": "row", "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row",
}  # fmt: skip
_FALCON = {
    "self_attention.query_key_value": "column", "self_attention.dense": "row",
    "mlp.dense_h_to_4h": "column", "mlp.dense_4h_to_h": "row",
}  # fmt: skip
LAYER_PLANS = {"falcon": _FALCON, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
HEAD_COUNTS = ("num_heads", "num_kv_heads")  # attributes by which a Falcon's attention shapes its projections


def tensor_parallel_model(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut `model` in place over the one-dimensional `mesh`; every rank then gives the logits of the whole model.

    Parameters become DTensors, so that `shards.load` fills each rank's part; norms and biases after a sum stay whole.
    Works on meta. A layer adds up twice, and the logits are gathered once. A mesh of one leaves the model as it is.
    Raises PlanError for a family without a plan, and for heads or columns that the ranks cannot share evenly.
    """
    size = mesh.size()
    if size == 1:
        return model
    plan = _layer_plan(model)
    _check_heads(model, size)
    for layer in decoder_layers(model):
        _check_columns(layer, plan, size)
        parallelize_module(layer, mesh, {name: _style(kind) for name, kind in plan.items()})
        _share_heads(layer, size)
    _cut_vocabulary(model, mesh)
    return model


def _layer_plan(model: nn.Module) -> dict[str, str]:
    family = model.config.model_type
    plan = LAYER_PLANS.get(family)
    if plan is None or (family == "falcon" and (model.config.alibi or not model.config.new_decoder_architecture)):
        what = "an older Falcon (multi-query, or with ALiBi)" if family == "falcon" else f"model_type {family!r}"
        raise PlanError(f"There is no tensor-parallel plan for {what}.", "backend=fsdp, which shards every model")
    return plan


def _check_heads(model: nn.Module, size: int) -> None:
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    for what, count in (("attention heads", heads), ("key and value heads", kv_heads)):
        if count % size:
            raise PlanError(f"{count} {what} cannot be divided by {size} ranks.", "fewer devices, or backend=fsdp")


def _check_columns(layer: nn.Module, plan: dict[str, str], size: int) -> None:
    for name, kind in plan.items():
        columns = layer.get_submodule(name).weight.shape[0 if kind == "column" else 1]
        if columns % size:
            raise PlanError(f"{columns} columns of {name} cannot be divided by {size} ranks.", "fewer devices")


def _style(kind: str) -> ParallelStyle:
    return ColwiseParallel() if kind == "column" else RowwiseParallel()


def _share_heads(layer: nn.Module, size: int) -> None:
    """Tell an attention how many heads its rank has, where it does not see that from its projections."""
    attention = getattr(layer, "self_attention", None)
    for name in HEAD_COUNTS:
        if hasattr(attention, name):
            setattr(attention, name, getattr(attention, name) // size)


def _cut_vocabulary(model: nn.Module, mesh: DeviceMesh) -> None:
    """Rows of the embedding and of the head on their ranks; tied ones stay tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        head.weight = embedding.weight
