"""An engine's use of devices: the layout of the parameters, the pool for keys and values, the traffic of the link."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """The part of a plan that does not depend on batch and lengths, by rank: bytes of parameters, and the decoder
    layers from the first to before the end; `buffer_bytes` are the parameters that each gathers, widens or packs, and
    `offloaded_bytes` those of each that lie in main memory or on a disk instead."""

    parameter_bytes: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    buffer_bytes: int = 0
    offloaded_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pool:
    """The memory that an engine sets aside for keys and values; sequences that it cannot hold wait for their turn.

    `nbytes` if the engine was told so many, else what is left of its `share` of a card; `sequences` are the most that
    are answered at once.
    """

    sequences: int
    share: float = 1.0
    nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Traffic:
    """Work of the link in one pass through the model: all-reduces of hidden states, numbers of logits for each sequence
    that come together at the end, bytes of weights that are gathered, and over how many devices."""

    all_reduces: int = 0
    gathered_logits: int = 0
    gathered_bytes: int = 0
    gathered_over: int = 0
