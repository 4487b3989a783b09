"""The parts of the stored tensors of a quantized matrix (packed words, scales, zero points) that belong to a part of
the matrix."""

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
    """The part of a stored tensor, viewed with `shape`, that begins at `start` and has the given `sizes`."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A range of outputs or inputs: `size` of `whole`, beginning at `first`."""

    whole: int
    first: int
    size: int

    def over(self, unit: int) -> Span:
        """The range in units (words or groups) of `unit` outputs or inputs each; a single unit for all if `unit` is
        0."""
        if not unit:
            return Span(1, 0, 1)
        first = self.first // unit
        return Span(-(-self.whole // unit), first, -(-(self.first + self.size) // unit) - first)


def slab(*spans: Span) -> Slab:
    """The slab of a tensor with one span for each dimension."""
    return Slab(
        tuple(span.whole for span in spans), tuple(span.first for span in spans), tuple(span.size for span in spans)
    )


def slabs_of(form: Quantization, outputs: Span, inputs: Span) -> dict[str, Slab]:
    """The slabs for a part of a matrix, by the suffix of the tensor's name. Tensors that are not listed are needed
    completely, or not at all."""
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
    """CheckpointError for a stored tensor whose shape does not match its slab."""
    for leaf, entry in parts.items():
        if leaf not in slabs:
            continue
        expected = slabs[leaf].shape
        is_free = bool(form.flat) or leaf in SCALES  # only the order of its values is known
        if prod(entry.shape) != prod(expected) or (entry.shape != expected and not is_free):
            raise CheckpointError(
                f"{entry.file} has no {form.name} for {name}: {entry.name} is {_sizes(entry.shape)}, not "
                f"{_sizes(expected)}.",
                "the checkpoint is damaged, or not what its quantization_config says: fetch it again",
            )


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"
