"""Models that support decoding in slots, judged by their transformers config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FAMILIES = frozenset({
    "apertus", "arcee", "biogpt", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5",
    "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
    "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral", "mixtral", "mpt",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
})  # fmt: skip
"""The model_types for which a test has compared tokens generated in slots with those of one prompt at a time."""

LAYER_TYPES = {"full_attention", "sliding_attention"}
SHARED_FREQUENCIES = {"dynamic", "longrope"}


def why_static(config: Mapping[str, Any], is_remote_code: bool = False) -> str | None:
    """The reason why a model is decoded in static batches only; None if it supports slots."""
    family = config.get("model_type")
    if family not in FAMILIES or (is_remote_code and "auto_map" in config):
        return f"{family} is not one of the families that are known to support slots"
    if others := set(config.get("layer_types") or ()) - LAYER_TYPES:
        return f"layers of type {sorted(others)[0]} keep no keys and values for each token"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {str(part.get("rope_type", part.get("type"))) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if shared := kinds & SHARED_FREQUENCIES:
        return f"rotary frequencies of type {sorted(shared)[0]} depend on the longest sequence of a batch"
    return None


def why_no_guesses(config: Mapping[str, Any]) -> str | None:
    """The reason why a model decodes one token of a row in a step; None if it can check several draft tokens."""
    family = config.get("model_type")
    if family in ("bloom", "mpt") or config.get("alibi"):
        return f"the biases of a {family} with ALiBi are those of one new token"
    return None
