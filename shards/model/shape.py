"""The shape of a model: its sizes, and every parameter by name and shape. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Literal

Cut = Literal["whole", "column", "row", "key_value", "query_key_value", "embedding", "head"]
"""The way in which tensor parallelism may split a parameter: `column` by output rows (dim 0), `row` by inputs (dim 1);
`key_value` and `query_key_value` are columns in units of heads; `embedding` and `head` differ by engine; `whole` is on
every rank."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor, with its name in transformers' `model.named_parameters()`."""

    name: str
    shape: tuple[int, ...]
    cut: Cut = "whole"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The decoder layer that contains it, None for embedding, last norm and head."""
        return layer_of(self.name)


@cache
def layer_of(name: str) -> int | None:
    """The number of the decoder layer in a parameter's name; None if it is in no layer."""
    match = _LAYER.search(name)
    if match:
        return int(match.group(1))
    return None


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only language model. `parameters` are in the order of the module, tied ones once.

    `experts`: the number of experts in a mixture-of-experts layer, and the number used for each token. `windows`: the
    number of tokens that each layer's attention spans, None for all; empty if no layer has a sliding window.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    max_position_embeddings: int | None
    tied: bool
    gated_mlp: bool
    parallel_attention: bool
    expanded_cache: bool
    parameters: tuple[Parameter, ...]
    alibi: bool = False
    experts: tuple[int, int] = (1, 1)
    windows: tuple[int | None, ...] = ()

    def __hash__(self) -> int:
        """A hash of the sizes alone: a plan looks up the same shape thousands of times, and it has hundreds of
        parameters."""
        return hash((self.family, self.num_layers, self.hidden_size, len(self.parameters)))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def layer_parameters(self) -> int:
        """Parameters inside decoder layers: a prompt token is multiplied with all of these, but not with the head."""
        return sum(parameter.numel for parameter in self.parameters if parameter.layer is not None)

    @property
    def step_parameters(self) -> int:
        """Parameters that a decode step of one token reads: all but unused experts and an untied embedding."""
        table = 0
        if not self.tied:
            table = sum(p.numel for p in self.parameters if p.cut == "embedding")
        return self.num_parameters - table - sum(p.numel for p in self.idle)

    @property
    def idle(self) -> tuple[Parameter, ...]:
        """Parameters that a token does not use: of each stack of experts (a tensor of three dimensions) the unused
        ones."""
        number, used = self.experts
        stacks = (p for p in self.parameters if p.layer is not None and len(p.shape) == 3 and p.shape[0] == number)
        return tuple(replace(p, shape=(number - used, *p.shape[1:])) for p in stacks if used < number)

    def groups(self) -> dict[int | None, tuple[Parameter, ...]]:
        """Parameters by decoder layer; those outside the layers under None."""
        groups: dict[int | None, list[Parameter]] = {}
        for parameter in self.parameters:
            groups.setdefault(parameter.layer, []).append(parameter)
        return {layer: tuple(members) for layer, members in groups.items()}

    def cached_heads(self, kv_heads_only: bool = True) -> int:
        """Heads whose keys and values are cached: transformers' own Falcon (new decoder) caches all query heads."""
        if self.expanded_cache and not kv_heads_only:
            return self.num_attention_heads
        return self.num_key_value_heads

    def kept_tokens(self, tokens: float) -> float:
        """Tokens of a sequence of `tokens` that the cache of a layer keeps, averaged over the layers."""
        if not self.windows:
            return tokens
        return sum(min(tokens, window - 1) if window else tokens for window in self.windows) / len(self.windows)

    def kv_values_per_token(self, kv_heads_only: bool = True) -> int:
        """The number of values in the keys and values of one token in all layers, on one device."""
        return 2 * self.num_layers * self.cached_heads(kv_heads_only) * self.head_dim
