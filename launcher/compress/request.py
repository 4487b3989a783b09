"""The checked request for a compression, and the memory that it needs. Does not import torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.schema import ConfigError
from shards.model.quantization import INT4_GROUPS
from shards.model.shape import layer_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.checkpoint.tensor_files import TensorEntry
    from shards.model.shape import ModelShape, Parameter

METHODS = {
    "magnitude": "the smallest values become zeros",
    "structured": "the weakest inner MLP columns, and with a Llama heads, are cut out: smaller shapes",
    "llm_pruner": "the same, the weakest by the gradients of the loss of the calibration prompts",
    "rtn": "values are rounded to the nearest of their scheme",
    "wanda": "values that matter least for the calibration prompts become zeros (llm-compressor)",
    "sparsegpt": "the same, and the remaining values compensate for them (llm-compressor)",
    "gptq": "rounded column by column, each compensating for the error of the last (llm-compressor)",
    "awq": "scaled before they are rounded, by the calibration prompts (llm-compressor)",
}
CALIBRATED = ("wanda", "sparsegpt", "gptq", "awq")
NARROWING = ("structured", "llm_pruner")
PRUNING = ("magnitude", "wanda", "sparsegpt")
SCHEMES = {"rtn": ("w4a16", "w8a8"), "gptq": ("w4a16", "w8a8"), "awq": ("w4a16",)}
BYTES_OF_A_VALUE = {"w4a16": 0.53, "w8a8": 1.0}
KEYS = ("model", "method", "out", "ratio", "pattern", "scheme", "prompts", "python")
EXAMPLE = "python -m launcher.compress model=tiny_llama method=magnitude ratio=0.5 out=smaller"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of a compression: `ratio` is the share of values (or columns and heads) to remove, `scheme` the
    format of quantized weights."""

    model: str
    method: str
    out: Path
    ratio: float = 0.5
    pattern: str = "unstructured"
    scheme: str = "w4a16"
    prompts: Path | None = None
    python: str | None = None


def read_request(items: Sequence[str]) -> Request:
    """The request in `key=value` arguments; ConfigError for an invalid one."""
    values: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if key not in KEYS or not equals or not value:
            raise ConfigError(f"{item} is not an argument of launcher.compress ({', '.join(KEYS)}).", EXAMPLE)
        values[key] = value
    for key in ("model", "method", "out"):
        if key not in values:
            raise ConfigError(f"{key}= is missing.", EXAMPLE)
    method = values["method"]
    if method not in METHODS:
        raise ConfigError(f"method={method} is not one of {', '.join(METHODS)}.", "method=magnitude")
    read = {"model", "method", "out"}
    if method in PRUNING:
        read |= {"ratio", "pattern"}
    if method in NARROWING:
        read |= {"ratio"}
    if method == "llm_pruner":
        read |= {"prompts"}
    if method in SCHEMES:
        read |= {"scheme"}
    if method in CALIBRATED:
        read |= {"prompts", "python"}
    for key in values.keys() - read:
        raise ConfigError(f"method={method} does not use {key}=.", f"leave {key}= out")
    if values.get("pattern", "2:4") not in ("2:4", "unstructured"):
        raise ConfigError(f"pattern={values['pattern']} is neither unstructured nor 2:4.", "pattern=2:4")
    if "scheme" in values and values["scheme"] not in SCHEMES[method]:
        known = SCHEMES[method]
        raise ConfigError(f"scheme={values['scheme']} is not one of {', '.join(known)}.", f"scheme={known[0]}")
    if method in CALIBRATED and "python" not in values:
        raise ConfigError(
            f"method={method} is llm-compressor's, whose packages do not fit those of the engines here.",
            "python=INTERPRETER of an environment with llmcompressor, or method=magnitude, or method=rtn",
        )
    if method in (*CALIBRATED, "llm_pruner") and "prompts" not in values:
        raise ConfigError(f"method={method} needs prompts to calibrate with.", "prompts=FILE, one prompt a line")
    out = Path(values["out"])
    if out.exists():
        raise ConfigError(f"{out} exists already, and is not overwritten.", f"out={out}_2")
    prompts = None
    if "prompts" in values:
        prompts = Path(values["prompts"])
        if not prompts.is_file():
            raise ConfigError(f"prompts={prompts} is not a file.", "prompts= with a text file, one prompt a line")
    return Request(
        model=values["model"],
        method=method,
        out=out,
        ratio=_ratio(values.get("ratio", "0.5"), values.get("pattern", "unstructured")),
        pattern=values.get("pattern", "unstructured"),
        scheme=values.get("scheme", "w4a16"),
        prompts=prompts,
        python=values.get("python"),
    )


def _ratio(text: str, pattern: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 < ratio < 1:
        raise ConfigError(f"ratio={text} is not a ratio between 0 and 1.", "ratio=0.5")
    if pattern == "2:4" and ratio != 0.5:
        raise ConfigError(f"ratio={text}, and pattern=2:4 leaves two of four values.", "ratio=0.5")
    return ratio


def matrices(shape: ModelShape, tensors: dict[str, TensorEntry]) -> dict[str, Parameter]:
    """The matrices of the decoder layers, by their names in the checkpoint; ConfigError if the checkpoint names them
    differently."""
    named = {p.name: p for p in shape.parameters if p.layer is not None and len(p.shape) == 2}
    missing = [name for name in named if name not in tensors]
    if missing:
        raise ConfigError(
            f"The checkpoint has no {missing[0]}: its tensors are named as in an older transformers.",
            "save it again with transformers 5 (from_pretrained, save_pretrained)",
        )
    return named


def check_shapes(request: Request, chosen: dict[str, Parameter]) -> None:
    """ConfigError for a matrix that the method cannot compress."""
    for name, parameter in chosen.items():
        inputs = parameter.shape[1]
        if request.pattern == "2:4" and inputs % 4:
            raise ConfigError(f"{name} has {inputs} inputs, which is not a multiple of four.", "pattern=unstructured")
        if request.method == "rtn" and request.scheme == "w4a16" and group_of(inputs) is None:
            raise ConfigError(f"{name} has {inputs} inputs, which is not a multiple of 32.", "scheme=w8a8")


def group_of(*inputs: int) -> int | None:
    """The largest group size, up to 128 weights per scale, that divides all numbers of inputs; None without one."""
    groups = [group for group in INT4_GROUPS if group <= 128 and all(count % group == 0 for count in inputs)]
    return max(groups, default=None)


def planned(request: Request, chosen: dict[str, Parameter], tensors: dict[str, TensorEntry]) -> list[str]:
    """Lines for the user: what will be read, held in memory and written, and what to expect from the result."""
    total = sum(entry.nbytes for entry in tensors.values())
    inside = sum(tensors[name].nbytes for name in chosen)
    values = sum(prod(parameter.shape) for parameter in chosen.values())
    largest = max(prod(parameter.shape) for parameter in chosen.values())
    layers: Counter[int | None] = Counter()
    for name, entry in tensors.items():
        layers[layer_of(name)] += entry.nbytes
    lines = [f"{request.method}: {METHODS[request.method]}", f"reads {total / 1e6:,.1f} MB, {len(tensors)} tensors"]
    if request.method in CALIBRATED:
        lines.append(f"holds the whole model ({total / 1e6:,.1f} MB) and the activations of a layer for all prompts")
    elif request.method == "llm_pruner":
        fp32 = 4 * (values + sum(prod(entry.shape) for entry in tensors.values()))
        lines.append(
            f"holds the model and gradients of its layers in fp32 ({fp32 / 1e6:,.1f} MB), and one prompt's activations"
        )
    else:
        most = max(layers.values()) + 12 * largest
        lines.append(f"holds one layer at a time, and its largest matrix in fp32: up to about {most / 1e6:,.1f} MB")
    written = total
    if request.method in SCHEMES:
        written = total - inside + int(values * BYTES_OF_A_VALUE[request.scheme])
    elif request.method in NARROWING:
        written = total - int(request.ratio * inside)
    lines.append(f"writes about {written / 1e6:,.1f} MB to {request.out}")
    if request.method in PRUNING:
        lines.append("zeros are stored and multiplied like other values: no fewer bytes, and no engine here is faster")
    return lines
