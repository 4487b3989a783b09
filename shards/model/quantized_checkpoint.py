"""What the `quantization_config` of a checkpoint's config.json says of its weights. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from shards.errors import PlanError
from shards.model.quantization import QUANTIZATIONS, Quantization

_UNQUANTIZED = "use the unquantized checkpoint."
_BESIDE = re.compile(
    r"\.(qzeros|scales|g_idx|weight_scale(_inv)?|weight_zero_point|weight_shape|input_scale|input_zero_point|[kv]_scale"
    r"|SCB|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))$"
)


def from_config(fields: Mapping[str, Any]) -> Quantization | None:
    """The quantization that a model's config names, None where it names none.

    PlanError, in one line, for a method whose bytes are not known here, or which no engine reads any more.
    """
    given = fields.get("quantization_config") or fields.get("compression_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise PlanError(f"The model's quantization_config is not an object: {given!r}.", _UNQUANTIZED)
    method = str(given.get("quant_method", "")).lower()
    if not method and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        method = "bitsandbytes"  # the first releases with 8 bits did not name themselves
    if method not in _READERS:
        raise PlanError(
            f"The bytes of a checkpoint quantized by {method or 'an unnamed method'} are not known.",
            f"a checkpoint of {', '.join(_READERS)}, or an unquantized one.",
        )
    return _READERS[method](given)


def _gptq(given: Mapping[str, Any]) -> Quantization:
    """vLLM reads symmetric GPTQ of 4 and 8 bits, without activation order over groups.

    Source: AutoGPTQConfig in vllm/model_executor/layers/quantization/auto_gptq.py.
    """
    bits, group = _number(given, "bits"), _number(given, "group_size")
    if bits not in (4, 8) or not given.get("sym", True):
        sort = "symmetric" if given.get("sym", True) else "asymmetric"
        raise PlanError(f"vLLM reads symmetric GPTQ of 4 or 8 bits, not {sort} of {bits}.", _UNQUANTIZED)
    if given.get("desc_act") and group != -1:
        raise PlanError("vLLM no longer reads GPTQ with desc_act=true over groups.", "a checkpoint with desc_act=false")
    rules: Mapping[str, Any] = given.get("dynamic") or {}
    if positive := [rule for rule in rules if not rule.startswith("-:")]:
        raise PlanError(f"The GPTQ rule {positive[0]!r} for single modules cannot be planned.", _UNQUANTIZED)
    return replace(
        QUANTIZATIONS["int4_g128"],
        name=_grouped_name("gptq", bits, group),
        bits=bits,
        block=(1, max(group, 0)),
        zero_points=False,
        zeros_to_load=True,
        head=bool(given.get("lm_head")),
        skipped=tuple(f"^(?:{rule.removeprefix('-:')})" for rule in rules),
        only=tuple(map(re.escape, _flat(given.get("modules_in_block_to_quantize")))),
    )


def _awq(given: Mapping[str, Any]) -> Quantization:
    """Names that are not converted are parts of names. Source: AutoAWQConfig in quantization/auto_awq.py."""
    bits = _number(given, "bits", "w_bit")
    group = _number(given, "group_size", "q_group_size")
    if bits != 4:
        raise PlanError(f"vLLM reads AWQ of 4 bits, not of {bits}.", _UNQUANTIZED)
    return replace(
        QUANTIZATIONS["int4_g128"],
        name=_grouped_name("awq", bits, group),
        block=(1, max(group, 0)),
        head=bool(given.get("lm_head")),
        skipped=tuple(map(re.escape, given.get("modules_to_not_convert") or ())),
    )


def _fp8(given: Mapping[str, Any]) -> Quantization:
    """A scale a matrix, or a block; static activations have one more. Source: Fp8LinearMethod in vLLM's fp8.py."""
    block = given.get("weight_block_size")
    names = given.get("ignored_layers") or given.get("modules_to_not_convert") or ()
    return replace(
        QUANTIZATIONS["fp8"],
        name="fp8" if block is None else f"fp8_{block[0]}x{block[1]}",
        block=(0, 0) if block is None else (int(block[0]), int(block[1])),
        part_bytes=4 if given.get("activation_scheme") == "static" else 0,
        skipped=tuple(f"^{re.escape(name)}$" for name in names),
    )


def _bitsandbytes(given: Mapping[str, Any]) -> Quantization:
    """Names are the beginning or the end of a module's. Source: should_convert_module in transformers/quantizers."""
    four = bool(given.get("load_in_4bit") or given.get("_load_in_4bit"))
    scheme = ("nf4_dq" if given.get("bnb_4bit_use_double_quant") else "nf4") if four else "int8"
    kind = str(given.get("bnb_4bit_quant_type") or "fp4")
    names = given.get("llm_int8_skip_modules") or ()
    return replace(
        QUANTIZATIONS[scheme],
        name=scheme.replace("nf4", kind),
        skipped=tuple(f"^(?:{name})|{re.escape(name)}$" for name in names),
    )


def _compressed(given: Mapping[str, Any]) -> Quantization:
    """One group for all linear layers: integers packed in words (W4A16, W8A16), or bytes of int8 or fp8.

    Source: the schemes in vllm/model_executor/layers/quantization/compressed_tensors/schemes.
    """
    groups = list((given.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise PlanError("Only compressed-tensors with one group, of all linear layers, can be planned.", _UNQUANTIZED)
    weights, activations = groups[0].get("weights") or {}, groups[0].get("input_activations")
    bits, kind, strategy = _number(weights, "num_bits"), weights.get("type", "int"), str(weights.get("strategy"))
    group = _number(weights, "group_size") if strategy == "group" else 0
    structure = weights.get("block_structure") or (0, 0)
    blocks = {"tensor": (0, 0), "channel": (1, 0), "group": (1, group), "block": tuple(structure)}
    packed = kind == "int" and activations is None and strategy in ("channel", "group")
    in_bytes = bits == 8 and strategy in (("tensor", "channel", "block") if kind == "float" else ("tensor", "channel"))
    sparse = (given.get("sparsity_config") or {}).get("format", "dense") != "dense"
    if sparse or not (packed or in_bytes):
        what = f"{strategy}-wise {kind}{bits}" + (" with quantized activations" if activations else "")
        raise PlanError(f"Compressed-tensors of {what}{', sparse,' if sparse else ''} cannot be planned.", _UNQUANTIZED)
    static = activations is not None and not activations.get("dynamic")
    return replace(
        QUANTIZATIONS["int4_g128" if packed else "fp8"],
        name=_grouped_name(f"{kind}", bits, group) if packed else f"{kind}8_{strategy}",
        bits=bits,
        block=blocks[strategy],
        zero_points=packed and not weights.get("symmetric", True),
        part_bytes=4 if static and kind == "float" else 0,
        layer_bytes=2 * 8
        if packed
        else 4 + (not activations.get("symmetric", True))
        if static and kind == "int"
        else 0,
        eight_bit_products=activations is not None,
        with_fp32=True,
        skipped=tuple(
            f"^(?:{name.removeprefix('re:')})" if name.startswith("re:") else f"^{re.escape(name)}$"
            for name in given.get("ignore") or ()
        ),
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
}


def unpacked(tensors: Mapping[str, tuple[int, ...]], quantization: Quantization) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that a quantized checkpoint's tensors stand for: [outputs, inputs] each."""
    per_word = 8 * quantization.word // quantization.bits
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if _BESIDE.search(name):
            continue
        if name.endswith(".qweight"):
            by_inputs = not quantization.name.startswith("awq")
            inputs, outputs = shape
            pair = (outputs, inputs * per_word) if by_inputs else (outputs * per_word, inputs)
            found[f"{name.removesuffix('qweight')}weight"] = pair
        elif name.endswith(".weight_packed"):
            found[name.removesuffix("_packed")] = (shape[0], shape[1] * per_word)
        elif quantization.flat and len(shape) == 2 and shape[1] == 1:
            found[name] = (shape[0] * 8 // quantization.bits, 1)
        else:
            found[name] = tuple(shape)
    return found


def _grouped_name(method: str, bits: int, group: int) -> str:
    return f"{method}{'_int' if method != 'int' else ''}{bits}" + (f"_g{group}" if group > 0 else "")


def _number(given: Mapping[str, Any], *names: str) -> int:
    value = next((given[name] for name in names if given.get(name) is not None), None)
    if not isinstance(value, int):
        raise PlanError(
            f"The model's quantization_config gives {names[0]}={value!r}, not a whole number.", _UNQUANTIZED
        )
    return value


def _flat(names: Iterable[Any] | None) -> list[str]:
    return [part for item in names or () for part in (_flat(item) if isinstance(item, list) else [str(item)])]
