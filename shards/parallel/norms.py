"""Root-mean-square norms as one operation of torch instead of eight."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class FusedNorm(nn.Module):
    """The norm of a Llama in one operation; in fp32 on a CPU its results are equal to the bit."""

    variance_epsilon: float
    weight: nn.Parameter

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)


def fuse_norms(model: nn.Module) -> int:
    """Give the fp32 norms of a model one operation each, in place; returns their number.

    Most families have a copy of Llama's norm under a name of their own: it is recognised by its code.
    """
    fused, code = 0, LlamaRMSNorm.forward.__code__
    for module in model.modules():
        own = getattr(type(module).forward, "__code__", None)
        if own is None or own.co_code != code.co_code or own.co_names != code.co_names:
            continue
        if module.weight.dtype is torch.float32:
            module.__class__ = FusedNorm
            fused += 1
    return fused
