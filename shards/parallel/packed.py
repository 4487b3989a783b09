"""Sequences of any lengths packed into one row, one after the other: nothing is computed for padding."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

_LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)


@contextmanager
def packed(lengths: tuple[int, ...]) -> Iterator[None]:
    """A context in which attention is given rows that pack sequences of these lengths."""
    token = _LENGTHS.set(lengths)
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def packed_lengths() -> tuple[int, ...] | None:
    """The lengths of the sequences in the packed row; None if each sequence has its own row."""
    return _LENGTHS.get()


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of `query` [1, heads, tokens, dim], causal within each packed sequence.

    Keys and values may have fewer heads. Returns [1, tokens, heads, dim].
    """
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    has_groups = query.shape[1] != key.shape[1]
    parts = (tensor.split(lengths, 2) for tensor in (query, key, value, out.transpose(1, 2)))
    for one_query, one_key, one_value, place in zip(*parts, strict=True):
        place.copy_(
            scaled_dot_product_attention(
                one_query, one_key, one_value, is_causal=True, scale=scale, enable_gqa=has_groups
            )
        )
    return out
