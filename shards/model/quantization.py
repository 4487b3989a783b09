"""The storage of quantized linear layers: packed values, scales, zero points, to the byte. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod

from shards.errors import PlanError
from shards.model.shape import Parameter

_PARTS_OF_FUSED = 3
"""vLLM keeps separate scales for queries, keys and values, also if a checkpoint has them in one matrix."""

_JOINED = (".k_proj.weight", ".v_proj.weight", ".up_proj.weight")
"""Matrices that vLLM appends to another one: bytes that exist once per layer are not counted for them again."""


INT4_GROUP, INT4_GROUPS, INT4_OUTPUTS = 64, (32, 64, 128, 256), 16
"""Inputs that share a scale in `int4_wo`; all such numbers that torch's kernel supports; outputs that it computes at
once."""


UNPACKED_BYTES = 128 << 20
"""Matrices to be quantized are read until there are this many bytes of them, and then packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """The storage of the matrix [outputs, inputs] of a linear layer; embeddings, norms and biases keep the model's
    type.

    `block`: the outputs and inputs that share a scale, 0 for all of them. `flat`: instead, the number of consecutive
    values that share one, across outputs. `scales`: the numbers stored for each of these (two: a scale and the value of
    the middle), of `scale_bytes` each, None for the width of the model's type. `nested`: the number of one-byte scales
    that share an fp32 scale. Rows are padded to `word` bytes. `zero_points`: there are zero points, packed like values.
    `zeros_to_load`: the engine drops them after loading. `part_bytes`: further bytes for each matrix (three matrices if
    queries, keys and values are fused). `layer_bytes`: further bytes for each layer of the engine.

    `fused`: layers join queries, keys and values, or gate and up, in one matrix (vLLM's kernels; not those of
    bitsandbytes). `unpacks`: a matrix is dequantized for multiplication. `eight_bit_products`: products are computed in
    8 bits, at up to twice the rate. `with_fp32`: activations may be fp32. `head`: the language model's head is
    quantized as well. `skipped`: patterns; a module whose name contains one is not quantized. `only`: patterns; if
    there are any, only modules whose names contain one are quantized.

    `ordered`: inputs that share a scale are not adjacent, and a number for each input names its scale. `kept`: our
    layers keep the format of a checkpoint, and so cannot choose what shares a scale.
    """

    name: str
    bits: int
    fused: bool = False
    block: tuple[int, int] = (0, 0)
    flat: int = 0
    scale_bytes: int | None = 4
    scales: int = 1
    nested: int = 0
    word: int = 1
    zero_points: bool = False
    zeros_to_load: bool = False
    part_bytes: int = 0
    layer_bytes: int = 0
    unpacks: bool = False
    eight_bit_products: bool = False
    head: bool = False
    with_fp32: bool = False
    ordered: bool = False
    kept: bool = False
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def while_loading(self) -> Quantization:
        """The storage until all weights are loaded."""
        if self.zeros_to_load:
            return replace(self, zero_points=True)
        return self

    def chooses(self, module: str) -> bool:
        """True if a module of the decoder layers, by its name, is stored quantized."""
        return _is_chosen(self.skipped, self.only, module)

    def applies(self, parameter: Parameter) -> bool:
        """True if a parameter is stored quantized: matrices of decoder layers, except those that are left out."""
        module, _, leaf = parameter.name.rpartition(".")
        inside = parameter.layer is not None or (self.head and parameter.cut == "head")
        return inside and leaf == "weight" and len(parameter.shape) == 2 and _is_chosen(self.skipped, self.only, module)

    def nbytes(self, parameter: Parameter, held: tuple[int, ...], dtype_bytes: int) -> int:
        """Bytes of the piece `held` of a parameter that the quantization applies to.

        A piece keeps the scales of the blocks that it touches, as vLLM's layers do under tensor parallelism.
        """
        rows, columns = held
        values = -(-columns * self.bits // (8 * self.word)) * self.word * rows
        if self.flat:
            values = -(-rows * columns * self.bits // 8)
        parts, once = 1, self.layer_bytes
        if self.fused and parameter.cut == "query_key_value":
            parts = _PARTS_OF_FUSED
        if self.ordered and self.kept:
            values += 4 * columns
        if self.fused and parameter.name.endswith(_JOINED):
            once = 0
        return values + self._scales_bytes(rows, columns, parts, dtype_bytes) + parts * self.part_bytes + once

    def _scales_bytes(self, rows: int, columns: int, parts: int, dtype_bytes: int) -> int:
        across, down, zeros = 1, parts, 0
        if self.block[1]:
            across = ceil(columns / self.block[1])
        if self.block[0]:
            down = ceil(rows / self.block[0])
        scales = across * down
        if self.flat:
            scales = ceil(rows * columns / self.flat)
        if self.zero_points:
            zeros = across * 4 * ceil(rows * self.bits / 32)
        if self.nested:
            return scales + 4 * ceil(scales / self.nested) + zeros
        return self.scales * scales * (self.scale_bytes or dtype_bytes) + zeros

    @property
    def has_rows(self) -> bool:
        """True if our layers store each row of the matrix, with its scales, as a row."""
        return not (self.fused or self.nested or (self.scales == 2 and not self.unpacks))

    def split_group(self, parameter: Parameter, held: tuple[int, ...]) -> str | None:
        """The reason why our layers cannot store a piece of a matrix: it is not made of whole groups."""
        units, is_strict = (1, 1), True
        if self.scales == 2 and not self.unpacks:
            units = (INT4_OUTPUTS, self.block[1])
        elif self.kept and held != parameter.shape:
            if self.nested:
                return f"{self.name} has scales of scales across a matrix, which cannot be cut."
            if self.ordered and held[1] != parameter.shape[1]:
                return f"{self.name} has groups of inputs from anywhere, which cannot be cut."
            per_word = 32 // self.bits if self.scales == 2 else 1
            units = (max(self.block[0], per_word), max(self.block[1] or per_word, self.flat))
            is_strict = bool(self.flat)
        for size, whole, unit in zip(held, parameter.shape, units, strict=True):
            if size % unit and (is_strict or size != whole):
                return (
                    f"{self.name} keeps {units[0]} outputs and {units[1]} inputs together, and a device would have "
                    f"{held[0]} x {held[1]} of a matrix."
                )
        return None

    def misfit(self, parameter: Parameter, held: tuple[int, ...]) -> str | None:
        """The reason why vLLM cannot cut a quantized matrix to `held`: whole groups and whole words stay together, and,
        once it cuts, whole blocks. Sources: can_implement of its kernels, validate_fp8_block_shape of fp8_utils.py."""
        per_word = 8 * self.word // self.bits
        for what, size, whole, together in (
            ("outputs", held[0], parameter.shape[0], self.block[0]),
            ("inputs", held[1], parameter.shape[1], self.block[1]),
        ):
            unit = together
            if self.word > 1:
                unit = max(together, per_word)
            if unit > 1 and size % unit and (self.word > 1 or size != whole):
                return f"{size} {what} on each device cannot be divided by the {unit} that {self.name} keeps together"
        return None


def as_kept(stored: Quantization, by_rows: bool = False) -> Quantization | None:
    """The format in which our layers keep matrices that a checkpoint has in format `stored`, with `by_rows` one that
    can be sharded by rows; None if they do not support it."""
    if stored.head or (by_rows and stored.nested):
        return None
    if not stored.fused:
        return replace(stored, kept=True)  # bitsandbytes
    if stored.name == "int8_channel" and stored.layer_bytes == 0:
        kept = QUANTIZATIONS["int8_dyn"]
    elif stored.name.startswith(("fp8", "float8")):
        kept = replace(_FP8, block=stored.block, fused=False, unpacks=True, eight_bit_products=False)
    elif stored.scale_bytes is not None:
        return None
    elif stored.bits == 4 and stored.block[1] in INT4_GROUPS and not stored.ordered and not by_rows:
        kept = replace(QUANTIZATIONS["int4_wo"], block=stored.block)
    else:
        kept = replace(QUANTIZATIONS["int4_wo"], bits=stored.bits, block=stored.block, unpacks=True)
        kept = replace(kept, ordered=stored.ordered)
    return replace(kept, name=stored.name, kept=True, skipped=stored.skipped, only=stored.only)


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of parameters: of the model's type, or quantized. The default counts values."""

    dtype_bytes: int = 1
    quantization: Quantization | None = None

    def nbytes(self, parameter: Parameter, held: tuple[int, ...] | None = None) -> int:
        """Bytes of a parameter, or of its piece of the shape `held`."""
        piece = parameter.shape if held is None else held
        if self.quantization is None or not self.quantization.applies(parameter):
            return prod(piece) * self.dtype_bytes
        return self.quantization.nbytes(parameter, piece, self.dtype_bytes)

    def kind(self, parameter: Parameter) -> str:
        """The kind that parameters of equal shape must share to have equal bytes."""
        if self.quantization is None or not self.quantization.applies(parameter):
            return ""
        if parameter.name.endswith(_JOINED):
            return "joined"
        return "quantized"


@cache
def _is_chosen(skipped: tuple[str, ...], only: tuple[str, ...], module: str) -> bool:
    if any(re.search(pattern, module) for pattern in skipped):
        return False
    return not only or any(re.search(pattern, module) for pattern in only)


_FP8 = Quantization(name="fp8", bits=8, fused=True, eight_bit_products=True)
_NF4 = Quantization(name="nf4", bits=4, flat=64, part_bytes=16 * 4, unpacks=True)
_INT4 = Quantization(name="int4_g128", bits=4, fused=True, block=(1, 128), scale_bytes=None, word=4, zero_points=True)

QUANTIZATIONS: Mapping[str, Quantization] = {
    "fp8": _FP8,
    "fp8_channel": replace(_FP8, name="fp8_channel", block=(1, 0)),
    "fp8_block": replace(_FP8, name="fp8_block", block=(128, 128)),
    "int8": Quantization(name="int8", bits=8, block=(1, 0), eight_bit_products=True),
    "int8_dyn": Quantization(name="int8_dyn", bits=8, block=(1, 0), eight_bit_products=True),
    "int8_wo": Quantization(name="int8_wo", bits=8, block=(1, 0), scale_bytes=None),
    "nf4": _NF4,
    "fp4": replace(_NF4, name="fp4"),
    "nf4_dq": replace(_NF4, name="nf4_dq", nested=256, part_bytes=16 * 4 + 4 + 256 * 4),
    "int4_wo": Quantization(name="int4_wo", bits=4, block=(1, INT4_GROUP), scale_bytes=None, scales=2),
    "int4_g128": _INT4,
}
"""Schemes by name.

fp8: a byte per value, an fp32 scale per matrix (one each for queries, keys and values), output, or block of 128 x 128.
Source: create_fp8_weight_parameter, create_fp8_scale_parameter in
vllm/model_executor/layers/quantization/utils/fp8_utils.py.
int8: LLM.int8, a byte per value and an fp32 scale per output (Int8Params.CB and SCB in bitsandbytes/nn/modules.py).
int8_wo: the same with a scale of the model's type (shards/load/quantized/quantizers.py). int8_dyn: as int8.
int4_wo: half a byte per value, and for each 64 inputs of an output a scale and the value of the middle
(shards/load/quantized/integer_quantizers.py).
nf4, fp4: half a byte per value, an fp32 maximum for each 64 values, a table of 16 fp32. nf4_dq: the maxima in a byte
each, an fp32 scale for each 256 of them, their fp32 offset, another table of 256 fp32 (quantize_4bit in
bitsandbytes/functional.py). A matrix is dequantized for prompts, not for single tokens (gemm_4bit in
backends/cuda/ops.py).
int4_g128: GPTQ and AWQ, eight values or eight zero points per int32, a scale of the model's type for each 128 inputs of
an output. Source: create_weights in vllm/model_executor/layers/quantization/auto_gptq.py, auto_awq.py. A symmetric GPTQ
has its zero points only while it is loaded (process_weights_after_loading of its kernels).
"""


def known_quantization(name: str) -> Quantization | None:
    """A scheme by its name, None for `none`; PlanError, with the known names, for any other."""
    if name == "none":
        return None
    if name not in QUANTIZATIONS:
        near = difflib.get_close_matches(name, ("none", *QUANTIZATIONS), 1, cutoff=0)
        known = ", ".join(("none", *QUANTIZATIONS))
        raise PlanError(f"quantization={name} is not one of {known}.", f"quantization={near[0]}")
    return QUANTIZATIONS[name]
