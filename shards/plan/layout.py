"""An engine's use of devices: the layout of the parameters, the pool for keys and values, the traffic of the link."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """The part of a plan that does not depend on batch and lengths, by rank: bytes of parameters, and the decoder
    layers [first, end). `buffer_bytes` are parameters that each rank gathers, dequantizes or packs; `offloaded_bytes`
    are its parameters in main memory or on disk."""

    parameter_bytes: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    buffer_bytes: int = 0
    offloaded_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pool:
    """The memory that an engine reserves for keys and values; sequences that do not fit wait.

    `nbytes` if the engine was given a size, else what is left of its `share` of a GPU. At most `sequences` are answered
    at a time.
    """

    sequences: int
    share: float = 1.0
    nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Traffic:
    """Communication in one forward pass: the number of all-reduces of hidden states, the number of logits of each
    sequence that are gathered at the end, the bytes of weights that are gathered, over how many devices, and whether
    these read them in shared memory."""

    all_reduces: int = 0
    gathered_logits: int = 0
    gathered_bytes: int = 0
    gathered_over: int = 0
    gathered_in_place: bool = False
