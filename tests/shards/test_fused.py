"""Norms and rotary embeddings in fewer operations: equal to those of their families, and not replaced if they would
differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from shards.parallel.fused import fuse_norms, fuse_rotations


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


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
HEADS = {"gemma2": {"head_dim": 8}, "qwen3": {"head_dim": 8}}


def built(family: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **HEADS.get(family, {}))
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["falcon", "gemma2", "llama", "mistral", "qwen2", "qwen3"])
def test_rotated_queries_and_keys_are_equal_to_the_bit(family: str, dtype: torch.dtype) -> None:
    """Also in later forwards with other positions, which have other angles."""
    model, plain = built(family, dtype), built(family, dtype)
    assert fuse_rotations(model) == 3
    assert fuse_rotations(model) == 0, "they are fused already"
    with torch.inference_mode():
        for ids in torch.randint(64, (2, 2, 11)):
            for start in (0, 5):
                positions = torch.arange(start, start + 11)[None]
                logits = [each(input_ids=ids, position_ids=positions).logits for each in (model, plain)]
                assert torch.equal(*logits)


def test_other_rotations_are_left_alone() -> None:
    assert fuse_rotations(built("gpt_neox", torch.float32)) == 0
