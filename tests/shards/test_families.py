"""Falcon's attention with a cache of kv heads only: its results, and the arguments for torch's kernels."""

from __future__ import annotations

import pytest
import torch
from handed import Handed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from shards.parallel.families import attend

BATCH, KV_HEADS, GROUP, KEYS, HEAD_DIM = 3, 2, 4, 9, 16
HEADS = KV_HEADS * GROUP


def inputs(length: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value and mask; the first row is left-padded, as in batches."""
    query = torch.randn(BATCH, length, HEADS, HEAD_DIM, device=device).transpose(1, 2)
    key, value = (torch.randn(BATCH, KV_HEADS, KEYS, HEAD_DIM, device=device) for _ in range(2))
    causal = torch.ones(length, KEYS, dtype=torch.bool, device=device).tril(KEYS - length)
    padding = 2 * (torch.arange(BATCH, device=device) == 0).view(BATCH, 1, 1, 1)
    mask = causal & (torch.arange(KEYS, device=device) >= padding)
    return query, key, value, mask


@pytest.mark.parametrize("length", [1, 2, KEYS])
def test_it_is_the_attention_of_expanded_keys_and_values(length: int) -> None:
    torch.manual_seed(0)
    query, key, value, mask = inputs(length)
    whole = [tensor.repeat_interleave(GROUP, 1) for tensor in (key, value)]
    expected = scaled_dot_product_attention(query, *whole, attn_mask=mask)
    torch.testing.assert_close(attend(query, key, value, mask, GROUP), expected.transpose(1, 2))
    torch.testing.assert_close(attend(query, *whole, mask, 1), expected.transpose(1, 2))
    if length in (1, KEYS):
        unmasked = scaled_dot_product_attention(query, *whole, is_causal=length > 1)
        torch.testing.assert_close(attend(query, key, value, None, GROUP), unmasked.transpose(1, 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_copies_no_keys(device: str) -> None:
    with FakeTensorMode(), Handed() as handed:
        query, key, value, mask = inputs(1, device)
        assert attend(query, key, value, mask, GROUP).shape == (BATCH, 1, HEADS, HEAD_DIM)
    [call] = handed.calls
    assert call["key"] is key
    assert call["shapes"][0] == (BATCH, KV_HEADS, GROUP, HEAD_DIM)
    assert not call.get("enable_gqa")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("device", "heads"), [("cpu", KV_HEADS), ("cuda", HEADS)])
def test_cuda_is_given_no_groups_in_a_prompt(device: str, heads: int, masked: bool) -> None:
    """Only one of CUDA's kernels that do not store the scores supports grouped heads, and only without a mask and in 16
    bits on newer GPUs. Others would store the scores of a prompt, gigabytes."""
    with FakeTensorMode(), Handed() as handed:
        query, key, value, mask = inputs(KEYS, device)
        assert attend(query, key, value, mask if masked else None, GROUP).shape == (BATCH, KEYS, HEADS, HEAD_DIM)
    [call] = handed.calls
    assert call["shapes"] == [(BATCH, HEADS, KEYS, HEAD_DIM), *[(BATCH, heads, KEYS, HEAD_DIM)] * 2]
    assert call["enable_gqa"] is (heads < HEADS)
