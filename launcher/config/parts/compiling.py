"""The values of `measure.compile`."""

from __future__ import annotations

from enum import Enum


class Compile(Enum):
    """How decode steps of a module engine run: eagerly, compiled, or captured as CUDA graphs; `auto` is the fastest
    known way that does not change the tokens."""

    auto = "auto"
    none = "none"
    inductor = "inductor"
    cudagraph = "cudagraph"
