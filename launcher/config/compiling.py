"""The values of `measure.compile`."""

from __future__ import annotations

from enum import Enum


class Compile(Enum):
    """Way in which the decode steps of a module engine are made: as they are written, or ahead; `auto` is what is known
    to be faster, if the tokens stay the same."""

    auto = "auto"
    none = "none"
    inductor = "inductor"
    cudagraph = "cudagraph"
