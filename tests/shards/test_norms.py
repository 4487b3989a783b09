"""Norms in one operation: equal to those of their families, and left alone where they would not be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from shards.parallel.norms import fuse_norms


@pytest.mark.parametrize("size", [32, 768])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm])
def test_results_are_equal_to_the_bit(norm: type[nn.Module], size: int) -> None:
    torch.manual_seed(0)
    module, hidden = norm(size, eps=1e-3), torch.randn(3, 5, size)
    nn.init.normal_(module.weight)
    expected = module(hidden)
    assert fuse_norms(module) == 1
    assert type(module) is not norm
    assert torch.equal(module(hidden), expected)


@pytest.mark.parametrize("module", [GemmaRMSNorm(8), LlamaRMSNorm(8).bfloat16(), nn.LayerNorm(8), nn.Sequential()])
def test_others_are_left_alone(module: nn.Module) -> None:
    kind = type(module)
    assert fuse_norms(module) == 0
    assert type(module) is kind
