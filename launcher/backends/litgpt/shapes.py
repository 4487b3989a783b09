"""Convert a transformers config to LitGPT's, and check an adapter. Imports neither LitGPT nor torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from launcher.config.schema import ConfigError
from shards.checkpoint.adapter_config import factor_shapes
from shards.model.config_fields import ConfigFields
from shards.model.known_shape import known_shape

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ELSEWHERE = "backend=transformers"
QKV = "attn.qkv"
PARTS_OF_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PLACES = {
    **dict.fromkeys(PARTS_OF_QKV, QKV), "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj",
    "self_attention.query_key_value": QKV, "self_attention.dense": "attn.proj",
    "mlp.dense_h_to_4h": "mlp.fc", "mlp.dense_4h_to_h": "mlp.proj",
}  # fmt: skip
"""LitGPT's matrix for each matrix of a layer of a Llama or a Falcon; several may be parts of the same one."""

LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)")


def litgpt_matrix(name: str) -> tuple[str, str]:
    """A module of transformers -> LitGPT's module, and the name within the layer; KeyError for what LitGPT does not
    adapt."""
    if name == "lm_head":
        return name, name
    match = LAYER.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return f"transformer.h.{match[1]}.{PLACES[match[2]]}", match[2]


def check_adapter(folder: Path, fields: Mapping[str, Any]) -> None:
    """ConfigError if an adapter is for matrices that LitGPT does not adapt, or for another model."""
    matrices = {parameter.name: parameter.shape for parameter in known_shape(fields).parameters}
    for (name, factor), shape in factor_shapes(folder).items():
        whole = matrices.get(f"{name}.weight")
        try:
            litgpt_matrix(name)
        except KeyError:
            whole = None
        if whole is None:
            fact = f"{folder} is for {name}, which is no matrix of this model that LitGPT adapts."
            raise ConfigError(fact, "the adapter of this model")
        outputs, inputs = whole
        fits = shape[-1:] == (inputs,) if factor == "A" else shape[:1] == (outputs,)
        if len(shape) != 2 or not fits:
            has = " x ".join(map(str, shape))
            fact = f"{folder} has {has} as lora_{factor} of {name}, which has {outputs} x {inputs}."
            raise ConfigError(fact, "the adapter of this model")


def litgpt_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of litgpt.Config; ConfigError for a config that LitGPT would misread or cannot express.

    LitGPT's converter goes by the name of a Falcon: one named 7b has one norm in each layer, one named 40b two.
    """
    family, config = str(fields.get("model_type")), ConfigFields(fields)
    if family not in ("falcon", "llama"):
        raise ConfigError(f"backend=litgpt converts a falcon and a llama here, and no {family}.", ELSEWHERE)
    heads = config.size("num_attention_heads")
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    values: dict[str, Any] = {
        "n_layer": config.size("num_hidden_layers"),
        "n_embd": hidden,
        "n_head": heads,
        "head_size": config.count("head_dim") or hidden // heads,
        "vocab_size": vocabulary,
        "padded_vocab_size": vocabulary,
        "block_size": config.count("max_position_embeddings") or 2048,
        "rotary_percentage": 1.0,
        "bias": False,
        **_rope(fields),
    }
    for name in ("bias", "alibi", "attention_bias", "mlp_bias"):
        if fields.get(name):
            raise ConfigError(f"backend=litgpt converts no {family} with {name}=true here.", ELSEWHERE)
    if family == "llama":
        return values | {
            "name": "llama",
            "n_query_groups": config.count("num_key_value_heads") or heads,
            "intermediate_size": config.size("intermediate_size"),
            "norm_class_name": "RMSNorm",
            "norm_eps": fields.get("rms_norm_eps", 1e-6),
            "mlp_class_name": "LLaMAMLP",
            "parallel_residual": False,
        }
    is_new = bool(fields.get("new_decoder_architecture"))
    norms = fields.get("num_ln_in_parallel_attn") or 2
    if is_new and norms != 2:
        raise ConfigError(f"backend=litgpt converts no Falcon with {norms} norms in a layer here.", ELSEWHERE)
    if not is_new and not (fields.get("multi_query", True) and fields.get("parallel_attn", True)):
        raise ConfigError("backend=litgpt converts no Falcon with as many keys as queries here.", ELSEWHERE)
    values |= {"name": "falcon-7b", "n_query_groups": 1}
    if is_new:
        values |= {"name": "falcon-40b", "n_query_groups": config.size("num_kv_heads")}
    return values | {
        "intermediate_size": config.count("ffn_hidden_size") or 4 * hidden,
        "norm_eps": fields.get("layer_norm_epsilon", 1e-5),
        "shared_attention_norm": not is_new,
    }


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding, plain or as Llama 3.1 stretches it."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    base = {"rope_base": int(rope.get("rope_theta") or fields.get("rope_theta") or 10000)}
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return base
        case "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            length = rope["original_max_position_embeddings"]
            return base | {"rope_adjustments": {name: rope[name] for name in names} | {"original_max_seq_len": length}}
        case kind:
            raise ConfigError(f"backend=litgpt has no rotary embedding of type {kind} here.", ELSEWHERE)
