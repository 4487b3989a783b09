"""Decode steps of Llamas, Falcons and their relatives as one loop over the layers.

transformers' own forward calls 93 functions of Python in each layer of a Llama, this loop 18. In a step of few rows
these calls take as long as the arithmetic of a small model.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.falcon import modeling_falcon as falcon
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from launcher.backends.slots.attention import NAME, attention
from shards.parallel.families import GroupedFalconAttention, attend
from shards.parallel.fused import ROTATE, FusedNorm, is_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.slots.cache import SlotCache

    Call = Callable[[torch.Tensor], torch.Tensor]
    Angles = tuple[torch.Tensor, torch.Tensor]


LLAMAS = (llama.LlamaModel.forward, mistral.MistralModel.forward, qwen2.Qwen2Model.forward)
ATTENTIONS = (llama.LlamaAttention.forward, mistral.MistralAttention.forward, qwen2.Qwen2Attention.forward)


class LlamaLayer:
    """A layer of a Llama: attention, then a gated MLP or another module in its place.

    A call takes the hidden states [rows, tokens, size] before the layer and returns those after it, as that of a
    FalconLayer does.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.post_norm = direct(layer.input_layernorm), direct(layer.post_attention_layernorm)
        self.query, self.key, self.value = direct(attention.q_proj), direct(attention.k_proj), direct(attention.v_proj)
        self.output = direct(attention.o_proj)
        self.attention, self.rotate = attention, attention.forward.__globals__[ROTATE]
        self.number, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.mlp: Call = mlp.forward
        if is_copy(type(mlp).forward, llama.LlamaMLP.forward):
            self.mlp = partial(
                gated, direct(mlp.gate_proj), direct(mlp.act_fn), direct(mlp.up_proj), direct(mlp.down_proj)
            )

    def __call__(
        self, hidden: torch.Tensor, angles: Angles, mask: torch.Tensor | None, cache: SlotCache
    ) -> torch.Tensor:
        rows, tokens, _ = hidden.shape
        heads = (rows, tokens, -1, self.head_dim)
        normed = self.norm(hidden)
        query, key = self.query(normed).view(heads).transpose(1, 2), self.key(normed).view(heads).transpose(1, 2)
        value = self.value(normed).view(heads).transpose(1, 2)
        query, key = self.rotate(query, key, *angles)
        key, value = cache.update(key, value, self.number)
        attended, _ = attention(self.attention, query, key, value, mask, self.scaling)
        hidden = hidden + self.output(attended.reshape(rows, tokens, -1))
        return hidden + self.mlp(self.post_norm(hidden))


class FalconLayer:
    """A layer of a Falcon whose attention and MLP have the same input, with a norm for each or one for both."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self.norm = direct(getattr(layer, "ln_attn", None) or layer.input_layernorm)
        self.mlp_norm: Call | None = None
        if hasattr(layer, "ln_mlp"):
            self.mlp_norm = direct(layer.ln_mlp)
        self.fused, self.dense = direct(attention.query_key_value), direct(attention.dense)
        self.rotate = attention.forward.__globals__[ROTATE]
        self.number, self.head_dim = attention.layer_idx, attention.head_dim
        self.group = attention.num_heads // attention.num_kv_heads
        self.up, self.activation, self.down = direct(mlp.dense_h_to_4h), direct(mlp.act), direct(mlp.dense_4h_to_h)

    def __call__(
        self, hidden: torch.Tensor, angles: Angles, mask: torch.Tensor | None, cache: SlotCache
    ) -> torch.Tensor:
        rows, tokens, _ = hidden.shape
        normed = mlp_normed = self.norm(hidden)
        if self.mlp_norm is not None:
            mlp_normed = self.mlp_norm(hidden)
        fused = self.fused(normed).view(rows, tokens, -1, self.group + 2, self.head_dim)
        query, key = fused[..., :-2, :].flatten(2, 3).transpose(1, 2), fused[..., -2, :].transpose(1, 2)
        query, key = self.rotate(query, key, *angles)
        key, value = cache.update(key, fused[..., -1, :].transpose(1, 2), self.number)
        attended = self.dense(attend(query, key, value, mask, self.group).reshape(rows, tokens, -1))
        return hidden + (self.down(self.activation(self.up(mlp_normed))) + attended)


def gated(gate: Call, activation: Call, up: Call, down: Call, normed: torch.Tensor) -> torch.Tensor:
    """The gated MLP of a Llama."""
    return down(activation(gate(normed)) * up(normed))


def direct(module: nn.Module) -> Call:
    """A plain linear layer or a fused norm as one call of torch; other modules by their forwards."""
    if type(module) is nn.Linear or (type(module) is falcon.FalconLinear and module.bias is None):
        return partial(linear, weight=module.weight, bias=module.bias)
    if type(module) is FusedNorm:
        size, weight, epsilon = module.weight.shape, module.weight, module.variance_epsilon
        return partial(torch.rms_norm, normalized_shape=size, weight=weight, eps=epsilon)
    return module.forward


class StraightStep:
    """The forward of a model for the new tokens of each row, on the model's modules and parameters."""

    def __init__(self, model: Any, layers: Sequence[LlamaLayer | FalconLayer], norm: nn.Module) -> None:
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.angles, self.layers, self.norm = model.base_model.rotary_emb.forward, layers, direct(norm)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, cache: SlotCache
    ) -> torch.Tensor:
        """The logits [rows, tokens, vocabulary] of `ids` [rows, tokens] at `positions` [rows, tokens]."""
        hidden = self.embed(ids)
        angles = self.angles(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, angles, mask, cache)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


def straight_step(model: Any) -> StraightStep | None:
    """The straight step of a model; None for other families, and if its modules have hooks or replaced forwards (FSDP2,
    offload). Hooks that are added later are not called, except on the embedding and the head.

    Relatives are recognised by the code of their classes, which in transformers are copies of each other.
    """
    base = model.base_model
    kind: type[LlamaLayer | FalconLayer]
    if type(model) is falcon.FalconForCausalLM:
        kind, layers, norm = FalconLayer, base.h, base.ln_f
        attentions = {layer.self_attention for layer in layers if layer.config.parallel_attn}
        is_known = all(type(attention) is GroupedFalconAttention for attention in attentions)
    elif is_copy(type(model).forward, llama.LlamaForCausalLM.forward) and is_copy(type(base).forward, *LLAMAS):
        kind, layers, norm = LlamaLayer, base.layers, base.norm
        attentions = {layer.self_attn for layer in layers}
        is_known = model.config._attn_implementation == NAME and all(
            is_copy(layer.self_attn.forward, *ATTENTIONS)
            and is_copy(type(layer).forward, llama.LlamaDecoderLayer.forward)
            for layer in layers
        )
    else:
        return None
    for module in model.modules():
        is_replaced = "forward" in vars(module) and module not in attentions
        if is_replaced or module._forward_hooks or module._forward_pre_hooks:
            return None
    if not is_known or len(attentions) < len(layers):
        return None
    return StraightStep(model, [kind(layer) for layer in layers], norm)
