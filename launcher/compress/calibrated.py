"""Run llm-compressor's one-shot methods in the interpreter of its own environment; imports nothing of the launcher.

calibrated.py MODEL OUT METHOD RATIO PATTERN SCHEME PROMPTS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

MOST_TOKENS = 512


def recipe(method: str, ratio: float, pattern: str, scheme: str) -> Any:
    mask = {"unstructured": "0:0"}.get(pattern, pattern)
    match method:
        case "wanda":
            return WandaPruningModifier(sparsity=ratio, mask_structure=mask, targets=["Linear"], ignore=["lm_head"])
        case "sparsegpt":
            return SparseGPTModifier(sparsity=ratio, mask_structure=mask, targets=["Linear"], ignore=["lm_head"])
        case "gptq":
            return GPTQModifier(targets=["Linear"], scheme=scheme.upper(), ignore=["lm_head"])
    return AWQModifier(targets=["Linear"], scheme=f"{scheme.upper()}_ASYM", ignore=["lm_head"])


def with_plain_layers(model: nn.Module) -> nn.Module:
    """The model with nn.Linear in place of derived classes, which llm-compressor skips."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            module.__class__ = nn.Linear
    return model


def main() -> None:
    source, out, method, ratio, pattern, scheme, prompts = sys.argv[1:]
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda self, *_, **__: None
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = with_plain_layers(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    texts = [line for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [tokenizer(text, truncation=True, max_length=MOST_TOKENS)["input_ids"] for text in texts]
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows if row])
    oneshot(
        model=model, dataset=data, recipe=recipe(method, float(ratio), pattern, scheme),
        num_calibration_samples=len(data), max_seq_length=MOST_TOKENS,
    )  # fmt: skip
    model.save_pretrained(out, save_compressed=method in ("gptq", "awq"), max_shard_size="2GB")


if __name__ == "__main__":
    main()
