"""Data types of weights and products, and the place of weights. Standard library only."""

from __future__ import annotations

from enum import Enum


class Precision(Enum):
    """Data type of weights and activations, by torch's name. The mixed precisions, by Fabric's names, have fp32 weights
    and compute products in 16 bits under autocast."""

    fp32 = "float32"
    fp16 = "float16"
    bf16 = "bfloat16"
    fp16_mixed = "16-mixed"
    bf16_mixed = "bf16-mixed"

    @property
    def is_mixed(self) -> bool:
        """True if products have a narrower type than the weights."""
        return self in (Precision.fp16_mixed, Precision.bf16_mixed)

    @property
    def products(self) -> Precision:
        """The type of products, and of keys and values."""
        return Precision[self.name.removesuffix("_mixed")]

    @property
    def weights(self) -> Precision:
        """The type of weights."""
        if self.is_mixed:
            return Precision.fp32
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of a weight."""
        return 4 if self.weights is Precision.fp32 else 2

    @property
    def mixed_bytes(self) -> int | None:
        """Bytes of a product value if its type differs from that of the weights."""
        if self.is_mixed:
            return self.products.num_bytes
        return None


class Offload(Enum):
    """Where weights are stored between forward passes: on the devices, in main memory, or in their files."""

    none = None
    cpu = "cpu"
    disk = "disk"
