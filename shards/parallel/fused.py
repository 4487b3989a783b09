"""Root-mean-square norms and rotary embeddings in fewer operations of torch, with the same results."""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, rotate_half

if TYPE_CHECKING:
    from collections.abc import Callable

ROTATE = apply_rotary_pos_emb.__name__


class FusedNorm(nn.Module):
    """The norm of a Llama in one operation; in fp32 on a CPU its results are equal to the bit."""

    variance_epsilon: float
    weight: nn.Parameter

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


class Rotation:
    """The rotation of queries and keys by the angles of their positions, in four operations each instead of seven.

    The signs of the rotated halves go into the sines, once for all layers of a forward; results are equal to the bit.
    """

    def __init__(self) -> None:
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None  # of the current forward, as the model made them
        self.factors: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        half = sin.shape[-1] // 2
        if self.angles is None or self.angles[0] is not cos or self.angles[1] is not sin:
            signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
            self.angles, self.factors = (cos, sin), (cos.unsqueeze(unsqueeze_dim), signed.unsqueeze(unsqueeze_dim))
        cosines, signed = self.factors
        rotated_query = torch.roll(query, half, -1).mul_(signed).add_(query * cosines)
        return rotated_query, torch.roll(key, half, -1).mul_(signed).add_(key * cosines)


def is_copy(function: Callable[..., Any], *originals: Callable[..., Any]) -> bool:
    """True if a function has the bytecode and the names of one of the others, decorators aside; constants, and what the
    names refer to, may differ.

    Most families of transformers have copies of Llama's classes and functions, under names of their own.
    """
    code = getattr(inspect.unwrap(function), "__code__", None)
    codes = [inspect.unwrap(original).__code__ for original in originals]
    return code is not None and any(code.co_code == c.co_code and code.co_names == c.co_names for c in codes)


def fuse_norms(model: nn.Module) -> int:
    """Give the fp32 norms of a model one operation each, in place; returns their number."""
    fused = 0
    for module in model.modules():
        if is_copy(type(module).forward, LlamaRMSNorm.forward) and module.weight.dtype is torch.float32:
            module.__class__ = FusedNorm
            fused += 1
    return fused


def fuse_rotations(model: nn.Module) -> int:
    """Give the attention of a model's layers one Rotation, in place; returns the number of layers.

    The forward of these layers calls a function of its module, in most families a copy of Llama's: the layers get the
    same forward with a Rotation under the name of that function.
    """
    fused, rotation = 0, Rotation()
    forwards: dict[type, FunctionType] = {}
    for module in model.modules():
        kind = type(module)
        forward: Any = kind.forward
        if "forward" in vars(module) or ROTATE not in getattr(getattr(forward, "__code__", None), "co_names", ()):
            continue
        rotate = inspect.unwrap(forward.__globals__[ROTATE])
        if not is_copy(rotate, apply_rotary_pos_emb) or not is_copy(rotate.__globals__["rotate_half"], rotate_half):
            continue
        if kind not in forwards:
            names = forward.__globals__ | {ROTATE: rotation}
            forwards[kind] = FunctionType(forward.__code__, names, None, forward.__defaults__, forward.__closure__)
            forwards[kind].__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(forwards[kind], module)
        fused += 1
    return fused
