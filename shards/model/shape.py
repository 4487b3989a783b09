"""The shape of a model, read from a transformers config: every parameter by name and shape. No torch, milliseconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Literal

from shards.errors import PlanError
from shards.model.config_fields import ConfigFields

if TYPE_CHECKING:
    from shards.model.config_fields import TransformersConfig

Cut = Literal["whole", "column", "row", "key_value", "query_key_value", "embedding", "head"]
"""How tensor parallelism may cut a parameter: `column` by output rows (dim 0), `row` by inputs (dim 1); `key_value` and
`query_key_value` are columns in units of heads; `embedding` and `head` differ by engine; `whole` is on every rank."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor, under the name that `model.named_parameters()` gives it in transformers."""

    name: str
    shape: tuple[int, ...]
    cut: Cut = "whole"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The decoder layer it belongs to, None for embedding, last norm and head."""
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
    """A decoder-only language model as sizes. `parameters` are in the order of the module, tied ones once.

    `experts` of a layer with a mixture of them: how many there are, and how many a token is sent to. `windows`: the
    tokens that each layer's attention spans, None for all; empty where it is all of them in every layer.
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

    @classmethod
    def from_config(cls, config: TransformersConfig) -> ModelShape:
        """The shape of a Falcon, Llama, Mistral, Qwen2 or Qwen3, exactly as transformers 5 builds it.

        Of other families: `shards.model.any_shape`.
        """
        family = str(config.get("model_type"))
        if family not in _FAMILIES:
            raise PlanError(
                f"The shapes of model_type {family!r} are not known from its config alone.",
                f"have its checkpoint on this machine, or use one of {', '.join(_FAMILIES)}.",
            )
        return _FAMILIES[family](ConfigFields(config))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def layer_parameters(self) -> int:
        """Parameters inside decoder layers: what a prompt token is multiplied with, the head left out."""
        return sum(parameter.numel for parameter in self.parameters if parameter.layer is not None)

    @property
    def step_parameters(self) -> int:
        """Parameters that a decode step of one token reads: all but idle experts and a table that is not the head."""
        table = 0
        if not self.tied:
            table = sum(p.numel for p in self.parameters if p.cut == "embedding")
        return self.num_parameters - table - sum(p.numel for p in self.idle)

    @property
    def idle(self) -> tuple[Parameter, ...]:
        """Parameters that a token does not use: of each stack of experts, a tensor of three dimensions, the part that
        it is not sent to."""
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
        """Heads whose keys and values a cache keeps: transformers' own Falcon (new decoder) keeps all query heads."""
        if self.expanded_cache and not kv_heads_only:
            return self.num_attention_heads
        return self.num_key_value_heads

    def kept_tokens(self, tokens: float) -> float:
        """Tokens that the cache of a layer keeps of a sequence of `tokens`, in the mean over the layers."""
        if not self.windows:
            return tokens
        return sum(min(tokens, window - 1) if window else tokens for window in self.windows) / len(self.windows)

    def kv_values_per_token(self, kv_heads_only: bool = True) -> int:
        """Keys and values of one token in all layers, counted in numbers, on one device."""
        return 2 * self.num_layers * self.cached_heads(kv_heads_only) * self.head_dim


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
    """Llama and those built like it; they differ in biases, in norms of queries and keys, and in defaults."""
    family = str(config.fields["model_type"])
    hidden, heads = config.size("hidden_size", 4096), config.size("num_attention_heads", 32)
    default_kv_heads = heads  # of a null
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
    """The window of each layer by the rules of transformers' configs; a Mistral that names none has one."""
    if family == "llama" or (family != "mistral" and not config.flag("use_sliding_window", False)):
        return ()
    if not config.fields.get("sliding_window", 4096):  # null and 0 are none
        return ()
    window, first = config.size("sliding_window", 4096), 0
    if family != "mistral":
        default = None  # a null is refused
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
