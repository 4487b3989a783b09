"""The values of `measure.compile`."""

from __future__ import annotations

from enum import Enum


class Compile(Enum):
    """The way in which decode steps of a module engine run: eagerly, compiled or captured; `auto` is the fastest known
    one that keeps the tokens."""

    auto = "auto"
    none = "none"
    inductor = "inductor"
    cudagraph = "cudagraph"
