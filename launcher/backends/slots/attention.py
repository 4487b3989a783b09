"""Attention over slots: it reads keys and values in place, those of a kv head once for all of its query heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from shards.parallel.families import FEW
from shards.parallel.families import NAME as FALCON
from shards.parallel.packed import attend_packed, packed_lengths

if TYPE_CHECKING:
    from torch import nn

NAME = "slots"


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' own functions compute it: `query` [rows, heads, tokens, dim] -> [rows, tokens, heads,
    dim].

    transformers repeats keys and values for all query heads whenever there is a mask, which is most steps in slots.
    """
    if (lengths := packed_lengths()) is not None:
        return attend_packed(query, key, value, lengths, scaling), None
    rows, heads, tokens, dim = query.shape
    group = heads // key.shape[1]
    if tokens == 1:  # a group's queries attend to the same keys: pass them as tokens of one head
        if group > 1:
            query = query.reshape(rows, heads // group, group, dim)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return attended.reshape(rows, 1, heads, value.shape[3]), None
    is_step = tokens < key.shape[2] and tokens * group <= FEW
    if is_step and group > 1 and mask is not None:  # a step with draft tokens: likewise, for each token
        query = query.reshape(rows, heads // group, group * tokens, dim)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask.repeat(1, 1, group, 1), scale=scaling)
        return attended.reshape(rows, heads, tokens, value.shape[3]).transpose(1, 2), None
    if group > 1:  # CUDA's only kernel for groups that does not store the scores needs a newer GPU and 16-bit types
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, is_causal=mask is None)
    return attended.transpose(1, 2), None


def use_slots(model: nn.Module) -> None:
    """Make a model use this attention if its family supports attention functions; otherwise its own works as well."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = NAME


def can_be_packed(model: nn.Module) -> bool:
    """True if the model's attention supports several sequences packed into one row."""
    return model.config._attn_implementation in (NAME, FALCON)
