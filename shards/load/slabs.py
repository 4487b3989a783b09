"""The parts of the tensors of a quantized matrix that belong to a part of the matrix: words, scales, zero points."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from shards.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shards.checkpoint.tensor_files import TensorEntry
    from shards.model.quantization import Quantization


@dataclass(frozen=True, slots=True)
class Slab:
    """The part of a stored tensor, seen as one of `shape`, that begins at `start` and spans `sizes`."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """`size` of `whole` outputs or inputs, from `first` on."""

    whole: int
    first: int
    size: int

    def over(self, unit: int) -> Span:
        """The units, of so many outputs or inputs each, that it touches; one for all of them if `unit` is 0."""
        if not unit:
            return Span(1, 0, 1)
        first = self.first // unit
        return Span(-(-self.whole // unit), first, -(-(self.first + self.size) // unit) - first)


def slab(*spans: Span) -> Slab:
    """The slab of a tensor whose dimensions these are."""
    return Slab(
        tuple(span.whole for span in spans), tuple(span.first for span in spans), tuple(span.size for span in spans)
    )


def slabs_of(form: Quantization, outputs: Span, inputs: Span) -> dict[str, Slab]:
    """The slabs of a part of a matrix, by what the names of its tensors add to that of the layer; of other tensors all
    is needed, or nothing."""
    per_word, groups = 32 // form.bits, inputs.over(form.block[1])
    if form.scales == 2 and form.name.startswith(("gptq", "awq")):
        by_inputs = form.name.startswith("gptq")
        words = (inputs.over(per_word), outputs) if by_inputs else (inputs, outputs.over(per_word))
        return {
            "qweight": slab(*words), "qzeros": slab(groups, outputs.over(per_word)), "scales": slab(groups, outputs),
            "g_idx": slab(inputs),
        }  # fmt: skip
    if form.scales == 2:
        return {
            "weight_packed": slab(outputs, inputs.over(per_word)), "weight_scale": slab(outputs, groups),
            "weight_zero_point": slab(outputs.over(per_word), groups), "weight_g_idx": slab(inputs),
        }  # fmt: skip
    if form.flat:
        if inputs.whole % form.flat:
            return {}
        return {
            "weight": slab(outputs, inputs.over(2)),
            "weight.absmax": slab(outputs, inputs.over(form.flat)),
        }
    scales = slab(outputs.over(form.block[0]), groups)
    return {"weight": slab(outputs, inputs), "SCB": slab(outputs)} | dict.fromkeys(SCALES, scales)


SCALES = ("weight_scale", "weight_scale_inv")


def check_shapes(name: str, form: Quantization, parts: Mapping[str, TensorEntry], slabs: Mapping[str, Slab]) -> None:
    """CheckpointError for a stored tensor of another shape than its part is to be cut from."""
    for leaf, entry in parts.items():
        if leaf not in slabs:
            continue
        expected = slabs[leaf].shape
        is_free = bool(form.flat) or leaf in SCALES  # of which only the order of the values is known
        if prod(entry.shape) != prod(expected) or (entry.shape != expected and not is_free):
            raise CheckpointError(
                f"{entry.file} has no {form.name} for {name}: {entry.name} is {_sizes(entry.shape)}, not "
                f"{_sizes(expected)}.",
                "the checkpoint is damaged, or not what its quantization_config says: fetch it again",
            )


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
