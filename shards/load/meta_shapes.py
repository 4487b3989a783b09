"""Sizes and shapes of a causal LM of transformers, as JSON: `python -m shards.load.meta_shapes < config.json`.

    {"sizes": {...}, "tensors": {name: shape, ...}, "notes": [...]}   or   {"problem": "...", "known": BOOL}

`known` says whether this transformers has the family. The model is built on the meta device: no weights are read or
made. Sizes have the names that `shape_from_tensors` expects, whatever the family calls them; tied tensors are named
once. It is a separate program so that its caller need not import torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache

from shards.load.meta import build_meta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.model.config_fields import TransformersConfig
    from shards.untrusted_files import JsonObject


SAME_NAME = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
    "max_position_embeddings", "num_experts_per_tok",
)  # fmt: skip
INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "inner_hidden_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)


def main() -> int:
    """Read a config from stdin and print the answer."""
    fields: JsonObject = json.load(sys.stdin)
    fields.pop("quantization_config", None)  # the plain model's shapes are wanted
    obstacle = problem(fields)
    known = fields.get("model_type") in CONFIG_MAPPING
    if obstacle:
        answer = {"problem": obstacle, "known": known}
    else:
        answer = describe(build_meta(fields, torch.bfloat16))
    print(json.dumps(answer))
    return 0


def problem(fields: TransformersConfig) -> str | None:
    """The reason why transformers itself cannot build a causal LM of a config; None if it can."""
    family, version = fields.get("model_type"), f"transformers {transformers.__version__}"
    if family in CONFIG_MAPPING:
        if CONFIG_MAPPING[family] in MODEL_FOR_CAUSAL_LM_MAPPING:
            return None
        return f"model_type {family!r} is not a causal language model of {version}"
    note = ""
    if "auto_map" in fields:
        note = ", and the model's own code is not run for a plan"
    return f"model_type {family!r} is not one of {version}{note}"


def describe(model: Any) -> JsonObject:
    """Sizes, shapes and notes of a model on meta."""
    config: Any = model.config.get_text_config(decoder=True)
    sizes = {name: getattr(config, name, None) for name in SAME_NAME}
    sizes["model_type"] = model.config.model_type
    sizes["intermediate_size"] = _first(config, INNER)
    sizes["num_experts"] = _first(config, EXPERTS)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    sizes["tie_word_embeddings"] = head is None or table.weight is head.weight
    layers, notes = _cache_layers(model), []
    if layers is None:
        model.set_attn_implementation("eager")  # does not inspect masks; same cache, except for latent attention
        layers = _cache_layers(model)
    if layers is None:
        notes.append("its KV cache is planned by the sizes of its config, and was not seen")
    else:
        sizes |= cache_sizes(layers)
        if without := sum(layer.keys is None for layer in layers):
            notes.append(f"{without} of its layers keep a state of fixed size, which is not planned")
    tensors = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return {
        "sizes": {name: size for name, size in sizes.items() if size is not None},
        "tensors": tensors,
        "notes": notes,
    }


def _first(config: Any, names: Sequence[str]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value), None)


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """One layer of a cache; one without attention has neither keys nor values."""

    keys: torch.Tensor | None
    values: torch.Tensor | None
    window: int | None

    @classmethod
    def of(cls, layer: Any) -> CachedLayer:
        return cls(*(getattr(layer, name, None) for name in ("keys", "values", "sliding_window")))


def _cache_layers(model: Any) -> list[CachedLayer] | None:
    """The cache of one token, on meta; None for a family whose forward needs values, or which has its own kind of
    cache."""
    model.config.pad_token_id = None  # else some families look for padding in the token ids, which have no values
    cache = DynamicCache(config=model.config)
    token = torch.zeros((1, 1), dtype=torch.long, device="meta")
    with contextlib.suppress(*FAILURES), torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
        layers = [CachedLayer.of(layer) for layer in cache.layers]
        if any(layer.keys is not None for layer in layers):
            return layers
    return None


def cache_sizes(layers: Sequence[CachedLayer]) -> JsonObject:
    """Heads and head size such that one token takes 2 x layers x heads x size values; the window of each layer."""
    keys = [layer.keys for layer in layers if layer.keys is not None]
    values = [layer.values for layer in layers if layer.values is not None]
    numbers = sum(tensor.numel() for tensor in (*keys, *values))
    heads = keys[0].shape[1]
    windows = [layer.window for layer in layers]
    if not any(windows):
        windows = []
    return {
        "num_key_value_heads": heads,
        "head_dim": math.ceil(numbers / (2 * len(layers) * heads)),
        "windows": windows,
    }


if __name__ == "__main__":
    raise SystemExit(main())
