"""Shapes of Falcon, Llama, Mistral, Qwen2 and Qwen3 models, computed from their configuration alone in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shards.errors import PlanError
from shards.model.config_fields import ConfigFields
from shards.model.shape import Cut, ModelShape, Parameter

if TYPE_CHECKING:
    from shards.model.config_fields import TransformersConfig


def known_shape(config: TransformersConfig) -> ModelShape:
    """The shape of a model of a known family, exactly as transformers 5 builds it.

    For other families see `shards.model.any_shape`.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise PlanError(
            f"The shapes of model_type {family!r} are not known from its config alone.",
            f"have its checkpoint on this machine, or use one of {', '.join(_FAMILIES)}.",
        )
    return _FAMILIES[family](ConfigFields(config))


def _linear(name: str, outputs: int, inputs: int, cut: Cut, bias: bool) -> list[Parameter]:
    parameters = [Parameter(f"{name}.weight", (outputs, inputs), cut)]
    if bias:
        if cut == "row":
            cut = "whole"
        parameters.append(Parameter(f"{name}.bias", (outputs,), cut))
    return parameters


def _layer_norm(name: str, width: int) -> list[Parameter]:
    return [Parameter(f"{name}.weight", (width,)), Parameter(f"{name}.bias", (width,))]


def _head_dim(hidden: int, heads: int) -> int:
    if hidden % heads:
        fact = f"hidden_size {hidden} cannot be divided into {heads} attention heads."
        raise PlanError(fact, "a config.json whose hidden_size is a multiple of num_attention_heads.")
    return hidden // heads


def _falcon(config: ConfigFields) -> ModelShape:
    """Falcon-7B (one kv head), Falcon-40B/180B (new decoder) and Falcon-RW (one kv head for each query head)."""
    hidden, heads = config.size("hidden_size", 4544), config.size("num_attention_heads", 71)
    vocab, layers = config.size("vocab_size", 65024), config.size("num_hidden_layers", 32)
    new = config.flag("new_decoder_architecture", False)
    parallel, tied = config.flag("parallel_attn", True), config.flag("tie_word_embeddings", True)
    inner, head_dim = config.size("ffn_hidden_size", 4 * hidden), _head_dim(hidden, heads)
    multi_query = not new and config.flag("multi_query", True)
    kv_heads = heads
    if multi_query:
        kv_heads = 1
    elif new:
        kv_heads = config.size("num_kv_heads", heads)
    num_norms = config.count("num_ln_in_parallel_attn")
    norms: tuple[str, ...] = ("input_layernorm",)
    if not parallel:
        norms = ("post_attention_layernorm", "input_layernorm")
    elif num_norms == 2 or (num_norms is None and new):
        norms = ("ln_attn", "ln_mlp")
    bias = config.flag("bias", False)
    parameters = [Parameter("transformer.word_embeddings.weight", (vocab, hidden), "embedding")]
    for i in range(layers):
        at = f"transformer.h.{i}"
        fused = (heads + 2 * kv_heads) * head_dim
        parameters += _linear(f"{at}.self_attention.query_key_value", fused, hidden, "query_key_value", bias)
        parameters += _linear(f"{at}.self_attention.dense", hidden, hidden, "row", bias)
        parameters += _linear(f"{at}.mlp.dense_h_to_4h", inner, hidden, "column", bias)
        parameters += _linear(f"{at}.mlp.dense_4h_to_h", hidden, inner, "row", bias)
        parameters += [parameter for norm in norms for parameter in _layer_norm(f"{at}.{norm}", hidden)]
    parameters += _layer_norm("transformer.ln_f", hidden)
    if not tied:
        parameters.append(Parameter("lm_head.weight", (vocab, hidden), "head"))
    return ModelShape(
        family="falcon",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        intermediate_size=inner,
        max_position_embeddings=config.size("max_position_embeddings", 2048),
        tied=tied,
        gated_mlp=False,
        parallel_attention=new or parallel,
        expanded_cache=new,
        parameters=tuple(parameters),
        alibi=config.flag("alibi", False),
    )


def _llama(config: ConfigFields) -> ModelShape:
    """Llama and similar families; they differ in biases, in norms of queries and keys, and in defaults."""
    family = str(config.fields["model_type"])
    hidden, heads = config.size("hidden_size", 4096), config.size("num_attention_heads", 32)
    default_kv_heads = heads  # for a null field
    if "num_key_value_heads" not in config.fields:
        default_kv_heads = _DEFAULT_KV_HEADS.get(family, heads)
    kv_heads = config.size("num_key_value_heads", default_kv_heads)
    head_dim = config.size("head_dim", _DEFAULT_HEAD_DIM.get(family) or _head_dim(hidden, heads))
    layers, inner = config.size("num_hidden_layers", 32), config.size("intermediate_size", _DEFAULT_INNER[family])
    vocab = config.size("vocab_size", _DEFAULT_VOCABULARY[family])
    tied = config.flag("tie_word_embeddings", False)
    biased = family in ("llama", "qwen3") and config.flag("attention_bias", False)
    mlp_bias = family == "llama" and config.flag("mlp_bias", False)
    parameters = [Parameter("model.embed_tokens.weight", (vocab, hidden), "embedding")]
    for i in range(layers):
        at = f"model.layers.{i}"
        parameters += _linear(f"{at}.self_attn.q_proj", heads * head_dim, hidden, "column", biased or family == "qwen2")
        for part in ("k_proj", "v_proj"):
            rows = kv_heads * head_dim
            parameters += _linear(f"{at}.self_attn.{part}", rows, hidden, "key_value", biased or family == "qwen2")
        parameters += _linear(f"{at}.self_attn.o_proj", hidden, heads * head_dim, "row", biased)
        if family == "qwen3":
            parameters += [Parameter(f"{at}.self_attn.{part}.weight", (head_dim,)) for part in ("q_norm", "k_norm")]
        parameters += _linear(f"{at}.mlp.gate_proj", inner, hidden, "column", mlp_bias)
        parameters += _linear(f"{at}.mlp.up_proj", inner, hidden, "column", mlp_bias)
        parameters += _linear(f"{at}.mlp.down_proj", hidden, inner, "row", mlp_bias)
        parameters += [
            Parameter(f"{at}.{n}.weight", (hidden,)) for n in ("input_layernorm", "post_attention_layernorm")
        ]
    parameters += [Parameter("model.norm.weight", (hidden,))]
    if not tied:
        parameters.append(Parameter("lm_head.weight", (vocab, hidden), "head"))
    return ModelShape(
        family=family,
        windows=_windows(config, family, layers),
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        intermediate_size=inner,
        max_position_embeddings=config.size("max_position_embeddings", _DEFAULT_POSITIONS[family]),
        tied=tied,
        gated_mlp=True,
        parallel_attention=False,
        expanded_cache=False,
        parameters=tuple(parameters),
    )


def _windows(config: ConfigFields, family: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer by the rules of transformers' configs; a Mistral without this setting has
    one."""
    if family == "llama" or (family != "mistral" and not config.flag("use_sliding_window", False)):
        return ()
    if not config.fields.get("sliding_window", 4096):  # null and 0 mean no window
        return ()
    window, first = config.size("sliding_window", 4096), 0
    if family != "mistral":
        default = None  # a null field is an error
        if "max_window_layers" not in config.fields:
            default = 28
        first = config.number("max_window_layers", 0, default)
    kinds = config.texts("layer_types")
    if not kinds:
        return tuple(None if number < first else window for number in range(layers))
    if len(kinds) != layers:
        raise config.wrong("layer_types", f"{kinds}, not a type for each of {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_INNER = {"llama": 11008, "mistral": 14336, "qwen2": 22016, "qwen3": 22016}
_DEFAULT_VOCABULARY = {"llama": 32000, "mistral": 32000, "qwen2": 151936, "qwen3": 151936}
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_FAMILIES: dict[str, Callable[[ConfigFields], ModelShape]] = {
    "falcon": _falcon,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
}

KNOWN_FAMILIES = frozenset(_FAMILIES)
"""The `model_type`s whose parameters follow from their config."""
