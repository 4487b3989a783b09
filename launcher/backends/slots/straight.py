"""Decode steps of a Llama and its relatives as one loop over the layers.

transformers' own forward makes about 300 calls of Python for each layer, which in a step of few rows take as long as
the arithmetic of a small model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from launcher.backends.slots.attention import NAME, attention
from shards.parallel.fused import ROTATE, FusedNorm, is_copy

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.backends.slots.cache import SlotCache

    Call = Callable[[torch.Tensor], torch.Tensor]

MODELS = (llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model)
ATTENTIONS = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention)


@dataclass(frozen=True, slots=True)
class Layer:
    """What a decoder layer computes, in the order in which it does."""

    norm: Call
    query: Call
    key: Call
    value: Call
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    attention: nn.Module
    output: Call
    post_norm: Call
    mlp: Call

    @classmethod
    def of(cls, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        if is_copy(type(mlp).forward, llama.LlamaMLP.forward):
            mlp = gated(direct(mlp.gate_proj), direct(mlp.act_fn), direct(mlp.up_proj), direct(mlp.down_proj))
        return cls(
            direct(layer.input_layernorm),
            direct(attention.q_proj),
            direct(attention.k_proj),
            direct(attention.v_proj),
            attention.forward.__globals__[ROTATE],
            attention,
            direct(attention.o_proj),
            direct(layer.post_attention_layernorm),
            mlp,
        )


def direct(module: nn.Module) -> Call:
    """A plain linear layer or a fused norm as one call of torch; other modules by their forwards."""
    if type(module) is nn.Linear:
        return partial(linear, weight=module.weight, bias=module.bias)
    if type(module) is FusedNorm:
        size, weight, epsilon = module.weight.shape, module.weight, module.variance_epsilon
        return partial(torch.rms_norm, normalized_shape=size, weight=weight, eps=epsilon)
    return module.forward


def gated(gate: Call, activation: Call, up: Call, down: Call) -> Call:
    return lambda hidden: down(activation(gate(hidden)) * up(hidden))


class StraightStep:
    """The forward of a model for one new token in each row, at positions below `length`. It keeps the model's modules
    and parameters, and the angles of all positions."""

    def __init__(self, model: Any, length: int) -> None:
        self.embed = model.model.embed_tokens
        weight = self.embed.weight
        self.cos, self.sin = model.model.rotary_emb(weight, torch.arange(length, device=weight.device)[None])
        self.layers = [Layer.of(layer) for layer in model.model.layers]
        self.norm, self.head = direct(model.model.norm), model.lm_head

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None, cache: SlotCache
    ) -> torch.Tensor:
        """The logits [rows, 1, vocabulary] of `ids` [rows, 1] at `positions` [rows, 1]."""
        rows = len(ids)
        hidden = self.embed(ids)
        cos, sin = (angles[0].index_select(0, positions[:, 0])[:, None] for angles in (self.cos, self.sin))
        for number, layer in enumerate(self.layers):
            heads = (rows, -1, 1, layer.attention.head_dim)
            normed = layer.norm(hidden)
            query, key = layer.query(normed).view(heads), layer.key(normed).view(heads)
            value = layer.value(normed).view(heads)
            query, key = layer.rotate(query, key, cos, sin)
            key, value = cache.update(key, value, number)
            attended, _ = attention(layer.attention, query, key, value, mask, layer.attention.scaling)
            hidden = hidden + layer.output(attended.reshape(rows, 1, -1))
            hidden = hidden + layer.mlp(layer.post_norm(hidden))
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


def straight_step(model: Any, length: int) -> StraightStep | None:
    """The straight step of a model; None for other families, and where hooks or other forwards belong to its modules
    (FSDP2, offload).

    Relatives are recognised by the code of their classes, which in transformers are copies of each other.
    """
    if model.config._attn_implementation != NAME or not is_copy(type(model).forward, llama.LlamaForCausalLM.forward):
        return None
    if not is_copy(type(model.model).forward, *(kind.forward for kind in MODELS)):
        return None
    attentions = set()
    for layer in model.model.layers:
        attentions.add(layer.self_attn)
        is_known = is_copy(layer.self_attn.forward, *(kind.forward for kind in ATTENTIONS))
        if not is_known or not is_copy(type(layer).forward, llama.LlamaDecoderLayer.forward):
            return None
    for module in model.modules():
        is_replaced = "forward" in vars(module) and module not in attentions
        if is_replaced or module._forward_hooks or module._forward_pre_hooks:
            return None
    return StraightStep(model, length)
