"""The quantization of a checkpoint, from the `quantization_config` of its config.json. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from shards.errors import PlanError
from shards.model.config_fields import ConfigFields
from shards.model.quantization import QUANTIZATIONS, Quantization

if TYPE_CHECKING:
    from shards.model.config_fields import TransformersConfig

_UNQUANTIZED = "use the unquantized checkpoint."
_REPEATS = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
MOST_REPEATS = 5
"""Repeats in a regular expression for module names, at most: each further one multiplies the time of a failing match by
a hundred."""

_BESIDE = re.compile(
    r"\.(qzeros|scales|g_idx|weight_scale(_inv)?|weight_zero_point|weight_shape|input_scale|input_zero_point|[kv]_scale"
    r"|SCB|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))$"
)


def from_config(config: TransformersConfig) -> Quantization | None:
    """The quantization that a model's config names; None if it names none.

    PlanError, in one line, for a method whose bytes are not known here, or which no engine reads any more.
    """
    name = "compression_config"
    if config.get("quantization_config"):
        name = "quantization_config"
    given = ConfigFields(config).group(name)
    if not given.fields:
        return None
    method = str(given.fields.get("quant_method", "")).lower()
    if not method and (given.flag("load_in_4bit", False) or given.flag("load_in_8bit", False)):
        method = "bitsandbytes"  # the first releases with 8 bits did not store the method
    if method not in _READERS:
        raise PlanError(
            f"The bytes of a checkpoint quantized by {method or 'an unnamed method'} are not known.",
            f"a checkpoint of {', '.join(_READERS)}, or an unquantized one.",
        )
    return _READERS[method](given)


def _gptq(given: ConfigFields) -> Quantization:
    """GPTQ of 4 and 8 bits; asymmetric, or with activation order over groups, vLLM does not read it.

    Source: AutoGPTQConfig in vllm/model_executor/layers/quantization/auto_gptq.py.
    """
    bits, group, symmetric = given.size("bits"), _group_size(given, "group_size"), given.flag("sym", True)
    if bits not in (4, 8):
        raise PlanError(f"GPTQ of 4 and of 8 bits is read here, and this has {bits}.", _UNQUANTIZED)
    is_ordered = given.flag("desc_act", False) and group > 0
    name = _grouped_name("gptq", bits, group)
    if not symmetric:
        name += "_asym"
    if is_ordered:
        name += "_desc_act"
    rules = given.group("dynamic").fields
    if positive := [rule for rule in rules if not rule.startswith("-:")]:
        raise PlanError(f"The GPTQ rule {positive[0]!r} for single modules cannot be planned.", _UNQUANTIZED)
    return replace(
        QUANTIZATIONS["int4_g128"],
        name=name,
        ordered=is_ordered,
        bits=bits,
        block=(1, group),
        zero_points=not symmetric,
        zeros_to_load=symmetric,
        head=given.flag("lm_head", False),
        skipped=tuple(f"^(?:{_pattern(rule.removeprefix('-:'))})" for rule in rules),
        only=tuple(map(re.escape, _flat(given, "modules_in_block_to_quantize"))),
    )


def _awq(given: ConfigFields) -> Quantization:
    """AWQ; `modules_to_not_convert` has parts of module names. Source: AutoAWQConfig in quantization/auto_awq.py."""
    bits_name = next((name for name in ("bits", "w_bit") if name in given.fields), "w_bit")
    group_name = next((name for name in ("group_size", "q_group_size") if name in given.fields), "q_group_size")
    bits, group = given.size(bits_name), _group_size(given, group_name)
    if bits != 4:
        raise PlanError(f"vLLM reads AWQ of 4 bits, not of {bits}.", _UNQUANTIZED)
    return replace(
        QUANTIZATIONS["int4_g128"],
        name=_grouped_name("awq", bits, group),
        block=(1, group),
        head=given.flag("lm_head", False),
        skipped=tuple(map(re.escape, given.texts("modules_to_not_convert"))),
    )


def _fp8(given: ConfigFields) -> Quantization:
    """fp8: a scale per matrix or block, and one more for static activations. Source: Fp8LinearMethod in vLLM's
    fp8.py."""
    name, part_bytes = "fp8", 0
    block = _block(given, "weight_block_size")
    if block is not None:
        name = f"fp8_{block[0]}x{block[1]}"
    if given.fields.get("activation_scheme") == "static":
        part_bytes = 4
    names = given.texts("ignored_layers") or given.texts("modules_to_not_convert")
    return replace(
        QUANTIZATIONS["fp8"],
        name=name,
        block=block or (0, 0),
        part_bytes=part_bytes,
        skipped=tuple(f"^{re.escape(name)}$" for name in names),
    )


def _bitsandbytes(given: ConfigFields) -> Quantization:
    """bitsandbytes; a skipped name is the beginning or the end of a module's name. Source: should_convert_module in
    transformers/quantizers."""
    scheme = "int8"
    if given.flag("load_in_4bit", False) or given.flag("_load_in_4bit", False):
        scheme = "nf4"
        if given.flag("bnb_4bit_use_double_quant", False):
            scheme = "nf4_dq"
    kind = str(given.fields.get("bnb_4bit_quant_type") or "fp4")
    names = given.texts("llm_int8_skip_modules")
    return replace(
        QUANTIZATIONS[scheme],
        name=scheme.replace("nf4", kind),
        skipped=tuple(f"^(?:{_pattern(name)})|{re.escape(name)}$" for name in names),
    )


def _compressed(given: ConfigFields) -> Quantization:
    """compressed-tensors with one group for all linear layers: integers packed in words (W4A16, W8A16), or bytes of
    int8 or fp8.

    Source: the schemes in vllm/model_executor/layers/quantization/compressed_tensors/schemes.
    """
    groups = given.group("config_groups")
    names = list(groups.fields)
    if len(names) != 1 or groups.group(names[0]).fields.get("targets") != ["Linear"]:
        raise PlanError("Only compressed-tensors with one group, of all linear layers, can be planned.", _UNQUANTIZED)
    weights, activations = groups.group(names[0]).group("weights"), groups.group(names[0]).group("input_activations")
    bits, kind, strategy = weights.size("num_bits"), weights.fields.get("type", "int"), weights.fields.get("strategy")
    group = 0
    if strategy == "group":
        group = weights.size("group_size")
    block = {"channel": (1, 0), "group": (1, group), "block": _block(weights, "block_structure")}.get(str(strategy))
    packed = kind == "int" and bits in (4, 8) and not activations.fields and strategy in ("channel", "group")
    in_bytes = bits == 8 and (strategy in ("tensor", "channel") or (strategy == "block" and kind == "float"))
    sparse = given.group("sparsity_config").fields.get("format", "dense") != "dense"
    if sparse or not (packed or in_bytes):
        scheme = f"{strategy}-wise {kind}{bits}"
        if activations.fields:
            scheme += " with quantized activations"
        if sparse:
            scheme += ", sparse,"
        raise PlanError(f"Compressed-tensors of {scheme} cannot be planned.", _UNQUANTIZED)
    name, like, layer_bytes, part_bytes = f"{kind}8_{strategy}", QUANTIZATIONS["fp8"], 0, 0
    if packed:
        name, like, layer_bytes = _grouped_name(f"{kind}", bits, group), QUANTIZATIONS["int4_g128"], 2 * 8
    is_static = bool(activations.fields) and not activations.flag("dynamic", False)
    if is_static and kind == "float":
        part_bytes = 4
    elif is_static and kind == "int" and not packed:
        layer_bytes = 4 + (not activations.flag("symmetric", True))
    return replace(
        like,
        name=name,
        bits=bits,
        block=block or (0, 0),
        zero_points=packed and not weights.flag("symmetric", True),
        part_bytes=part_bytes,
        layer_bytes=layer_bytes,
        eight_bit_products=bool(activations.fields),
        with_fp32=True,
        ordered=packed and weights.fields.get("actorder") in (True, "group"),
        skipped=tuple(map(_ignored, given.texts("ignore"))),
    )


def _ignored(name: str) -> str:
    """The regular expression for an entry of `ignore`, which is a name, or an expression after `re:`."""
    if name.startswith("re:"):
        return f"^(?:{_pattern(name.removeprefix('re:'))})"
    return f"^{re.escape(name)}$"


_READERS: dict[str, Callable[[ConfigFields], Quantization]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
}


def unpacked(tensors: Mapping[str, tuple[int, ...]], quantization: Quantization) -> dict[str, tuple[int, ...]]:
    """Names and shapes [outputs, inputs] of the unquantized parameters, from the tensors of a quantized checkpoint."""
    per_word = 8 * quantization.word // quantization.bits
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if _BESIDE.search(name):
            continue
        if name.endswith(".qweight"):
            inputs, outputs = shape
            if quantization.name.startswith("awq"):
                outputs *= per_word
            else:
                inputs *= per_word
            shapes[f"{name.removesuffix('qweight')}weight"] = (outputs, inputs)
        elif name.endswith(".weight_packed"):
            shapes[name.removesuffix("_packed")] = (shape[0], shape[1] * per_word)
        elif quantization.flat and len(shape) == 2 and shape[1] == 1:
            shapes[name] = (shape[0] * 8 // quantization.bits, 1)
        else:
            shapes[name] = tuple(shape)
    return shapes


def _grouped_name(method: str, bits: int, group: int) -> str:
    name = f"{method}_int{bits}"
    if method == "int":
        name = f"int{bits}"
    if group > 0:
        name += f"_g{group}"
    return name


def _group_size(given: ConfigFields, name: str) -> int:
    """The number of values that share a scale; 0, which a config has as -1, for a whole row."""
    return max(given.number(name, -1), 0)


def _block(given: ConfigFields, name: str) -> tuple[int, int] | None:
    value = given.fields.get(name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise given.wrong(name, f"{value!r}, not two whole numbers, as [128, 128]")
    sides = ConfigFields({f"{name}[{side}]": number for side, number in enumerate(value)}, given.name)
    return sides.size(f"{name}[0]"), sides.size(f"{name}[1]")


def _pattern(text: str) -> str:
    """A regular expression from a config; PlanError if it is invalid, or may take too long to match."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise PlanError(f"The model's quantization_config has {text!r}: {error}.", _UNQUANTIZED) from None
    if len(_REPEATS.findall(text)) > MOST_REPEATS or _REPEATED_GROUP.search(text):
        raise PlanError(
            f"The model's quantization_config has {text!r}, which may take too long to match.", _UNQUANTIZED
        )
    return text


def _flat(given: ConfigFields, name: str) -> list[str]:
    """The texts of a list, or of a list of lists."""
    value = given.fields.get(name) or []
    lists = [value]
    if isinstance(value, list) and all(isinstance(item, list) for item in value):
        lists = value
    return [text for part in lists for text in ConfigFields({name: part}, given.name).texts(name)]
