"""Special treatment of model families: a Falcon attention that caches only the kv heads, and that is given a mask only
if causal masking alone does not suffice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from shards.parallel.packed import attend_packed, packed_lengths

if TYPE_CHECKING:
    from transformers import Cache


NAME = "grouped_falcon"
FEW = 256
"""With at most this many queries of a group, the group is computed in one attention call, with a mask for each
query."""


class GroupedFalconAttention(FalconAttention):
    """Falcon's grouped attention with a cache of [batch, kv heads, length, head_dim].

    transformers expands keys and values to all query heads before caching them: 16 times the bytes for Falcon-40B. For
    the single kv head of Falcon-7B it relies on torch to expand them, which on CUDA materializes all attention scores.
    The fused rows are (queries of a group, its key, its value) for each kv head, also if tensor parallelism has left
    only some of the kv heads. Returns the same values as FalconAttention.forward.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        batch, length, _ = hidden_states.shape
        group = self.num_heads // self.num_kv_heads
        fused = self.query_key_value(hidden_states).view(batch, length, -1, group + 2, self.head_dim)
        query = fused[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        attended = attend(query, key, value, attention_mask, group)
        return self.dense(attended.reshape(batch, length, -1)), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, group: int
) -> torch.Tensor:
    """Attention of `query` [batch, heads, length, head_dim], with `group` query heads for each head of `key` and
    `value`.

    `mask` [batch, 1, length, keys] applies to all heads; without a mask attention is causal. Returns [batch, length,
    heads, head_dim].
    """
    batch, heads, length, head_dim = query.shape
    if (lengths := packed_lengths()) is not None:
        return attend_packed(query, key, value, lengths)
    if length == 1:  # a group's queries attend to the same keys: pass them as tokens of one head
        rows = query.reshape(batch, heads // group, group, head_dim)
        return scaled_dot_product_attention(rows, key, value, attn_mask=mask).reshape(batch, 1, heads, head_dim)
    is_step = length < key.shape[2] and length * group <= FEW
    if is_step and group > 1 and mask is not None:  # a step with draft tokens: likewise, for each token
        rows = query.reshape(batch, heads // group, group * length, head_dim)
        attended = scaled_dot_product_attention(rows, key, value, attn_mask=mask.repeat(1, 1, group, 1))
        return attended.reshape(batch, heads, length, head_dim).transpose(1, 2)
    if query.is_cuda:  # kernels that do not store the scores lack groups, or support few GPUs and 16-bit types only
        key, value, group = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), 1
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1
    )
    return attended.transpose(1, 2)


def causal_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask for torch's attention; None if it would hide nothing beyond causal masking.

    Falcon always requests one, in order to add ALiBi to it. With a mask CUDA cannot use flash attention, the kernel
    that splits the keys of a decode step.
    """
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": True})


def keep_kv_heads_only(model: torch.nn.Module) -> int:
    """Give every attention of a Falcon without ALiBi the small cache, in place; returns how many were changed.

    Other families already cache only kv heads.
    """
    changed = 0
    for module in model.modules():
        if type(module) is FalconAttention and not module.config.alibi:
            assert module.config._attn_implementation == "sdpa", module.config._attn_implementation
            module.__class__ = GroupedFalconAttention
            changed += 1
    if changed:
        AttentionMaskInterface.register(NAME, causal_mask)
        model.config._attn_implementation = NAME
    return changed
