"""Keys and values of the sequences in the slots of a process: allocated once, with a different length in each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    Pair = tuple[torch.Tensor, torch.Tensor]
    Kind = tuple[torch.device, int, int]


@dataclass(frozen=True, slots=True)
class Reading:
    """A forward that reads prompts into the slots `rows` [n]: tokens from position `start` up to `ends` [n].

    Rows are padded on the right. With a `start` there is one row, `first_row`, without padding; with `lengths` the
    prompts are packed into one row.
    """

    rows: torch.Tensor
    ends: torch.Tensor
    first_row: int
    start: int = 0
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Stepping:
    """A forward that decodes in the first `rows` slots; the tokens are at `positions` [rows, tokens], all below
    `reach`."""

    rows: int
    positions: torch.Tensor
    reach: int


def as_multiplied(states: torch.Tensor) -> torch.Tensor:
    """Keys or values in the type that attention multiplies in: under autocast they arrive in several types."""
    kind = states.device.type
    if torch.is_autocast_enabled(kind):
        return states.to(torch.get_autocast_dtype(kind))
    return states


class SlotLayer(CacheLayerMixin):
    """The cache of one layer: keys and values [slots, kv heads, size, head_dim], initially zeros.

    A layer with a sliding window is a ring buffer: token n is at position n modulo the size, so that a row holds the
    last `size` tokens, all of which the newest one may attend to. `spare` further positions hold tokens that may be
    rejected later, so that they overwrite none that is still needed.
    """

    def __init__(self, slots: int, length: int, window: int | None, spare: int = 0) -> None:
        super().__init__()
        self.slots, self.window = slots, window
        self.size = length
        if window is not None:
            self.size = min(length, window + spare)
        self.is_sliding = window is not None
        self.doing: Reading | Stepping | None = None
        self.views: tuple[int, int, Pair] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate, with the shapes and types of these states."""
        self.keys, self.values = (
            torch.zeros(
                self.slots, states.shape[1], self.size, states.shape[3], dtype=states.dtype, device=states.device
            )
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Write the states of prompts; returns the keys and values that they attend to."""
        assert isinstance(self.doing, Reading)
        if self.doing.start:
            return self._read_on(self.doing, key_states, value_states)
        if self.doing.lengths is not None:
            return self._read_packed(self.doing.rows.tolist(), self.doing.lengths, key_states, value_states)
        for cache, states in ((self.keys, key_states), (self.values, value_states)):
            if states.shape[2] > self.size:
                states = self._last(states, self.doing.ends)
            cache[:, :, : states.shape[2]].index_copy_(0, self.doing.rows.to(cache.device), states)
        return key_states, value_states

    def _last(self, states: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The last `size` tokens of prompts [rows, heads, width, dim], each at its position in the ring buffer."""
        last = ends.to(states.device)[:, None] - 1
        tokens = last - (last - torch.arange(self.size, device=states.device)) % self.size
        tokens = tokens.clamp_(min=0)[:, None, :, None]
        return states.gather(2, tokens.expand(-1, states.shape[1], -1, states.shape[3]))

    def _read_packed(
        self, rows: list[int], lengths: tuple[int, ...], key_states: torch.Tensor, value_states: torch.Tensor
    ) -> Pair:
        for cache, states in ((self.keys, key_states), (self.values, value_states)):
            for row, length, part in zip(rows, lengths, states[0].split(lengths, 1), strict=True):
                cache[row, :, :length] = part
        return key_states, value_states

    def _read_on(self, reading: Reading, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        """Append the next tokens of one prompt; returns them after the earlier ones that they may attend to, in
        order."""
        start, row, end = reading.start, reading.first_row, reading.start + key_states.shape[2]
        if self.window is None:
            self.keys[row, :, start:end] = key_states[0]
            self.values[row, :, start:end] = value_states[0]
            return self.keys[row : row + 1, :, :end], self.values[row : row + 1, :, :end]
        device = key_states.device
        before = torch.arange(start - self._num_before(start), start, device=device) % self.size
        keys = torch.cat((self.keys[row : row + 1, :, before], key_states), 2)
        values = torch.cat((self.values[row : row + 1, :, before], value_states), 2)
        kept = min(end - start, self.size)
        positions = torch.arange(end - kept, end, device=device) % self.size
        self.keys[row].index_copy_(1, positions, key_states[0, :, -kept:])
        self.values[row].index_copy_(1, positions, value_states[0, :, -kept:])
        return keys, values

    def step(self, key_states: torch.Tensor, value_states: torch.Tensor, index: torch.Tensor) -> Pair:
        """Write new tokens at `index` of the flattened [slots, heads, size]; returns views of what the rows hold."""
        assert isinstance(self.doing, Stepping)
        rows, reach = self.doing.rows, self.doing.reach
        for cache, states in ((self.keys, key_states), (self.values, value_states)):
            cache.view(-1, cache.shape[3]).index_copy_(0, index, states.reshape(-1, cache.shape[3]))
        if self.views is None or self.views[0] != rows or self.views[1] != reach:
            self.views = rows, reach, (self.keys[:rows, :, :reach], self.values[:rows, :, :reach])
        return self.views[2]

    def _num_before(self, start: int) -> int:
        """The number of the first `start` tokens that the next one may attend to."""
        if self.window is None:
            return start
        return min(start, self.window - 1)

    def get_seq_length(self) -> int:
        """The number of earlier tokens, as reported to the model."""
        match self.doing:
            case Reading(start=start):
                return start
            case Stepping(reach=reach):
                return reach - self.doing.positions.shape[1]
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys that attention is given, position of the first of them)."""
        match self.doing:
            case Reading(start=start):
                before = self._num_before(start)
                return before + query_length, start - before
            case Stepping(reach=reach):
                return min(reach, self.size), 0
        return query_length, 0

    def get_max_length(self) -> int:
        """Tokens for which a slot has room."""
        return self.size

    get_max_cache_shape = get_max_length  # the name in older releases of transformers

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Keys and values, once they are allocated."""
        if not self.is_initialized:
            return ()
        return self.keys, self.values


class SlotCache(Cache):
    """The cache of `slots` sequences of at most `length` tokens. `do` sets the kind of the next forward."""

    def __init__(self, config: PretrainedConfig, slots: int, length: int, spare: int = 0) -> None:
        self.slots, self.length = slots, length
        windows = [
            layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
            for layer in DynamicCache(config=config).layers
        ]
        super().__init__(layers=[SlotLayer(slots, length, window, spare) for window in windows])
        self.doing: Reading | Stepping | None = None
        self._kinds: dict[Kind, bool] = {}  # kinds of layers that have run; True: sliding window
        self._index: dict[Kind, torch.Tensor] = {}
        self._bases: dict[Kind, torch.Tensor] = {}
        self._buffers: dict[tuple[Kind, int], Pair] = {}

    def do(self, forward: Reading | Stepping) -> None:
        self.doing = forward
        self._index.clear()
        for layer in self.layers:
            layer.doing = forward
        if isinstance(forward, Stepping):
            self._index.update({kind: self._places(kind) for kind in self._kinds})

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Pair:
        """Write the keys and values of this forward's tokens in one layer; returns those that they attend to."""
        layer: SlotLayer = self.layers[layer_idx]
        key_states, value_states = as_multiplied(key_states), as_multiplied(value_states)
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        if isinstance(self.doing, Reading):
            return layer.update(key_states, value_states)
        return layer.step(key_states, value_states, self._index_of(layer))

    def _index_of(self, layer: SlotLayer) -> torch.Tensor:
        """Indices of this step's tokens in the flattened [slots, heads, size]; layers of equal shape share them."""
        kind = layer.keys.device, layer.keys.shape[1], layer.size
        if kind not in self._index:
            self._kinds[kind] = layer.is_sliding
            self._index[kind] = self._places(kind)
        return self._index[kind]

    def _places(self, kind: Kind) -> torch.Tensor:
        assert isinstance(self.doing, Stepping)
        device, heads, size = kind
        rows, positions = self.doing.rows, self.doing.positions.to(device)[:, None]
        if kind not in self._bases:
            self._bases[kind] = torch.arange(self.slots * heads, device=device).view(-1, heads, 1) * size
        width = positions.shape[2]
        if (kind, width) not in self._buffers:
            bases = self._bases[kind]
            self._buffers[kind, width] = (
                bases.new_empty(self.slots, heads, width),
                bases.new_empty(self.slots, 1, width),
            )
        index, wrapped = (buffer[:rows] for buffer in self._buffers[kind, width])
        if self._kinds[kind]:  # a layer with a sliding window is a ring buffer
            positions = torch.remainder(positions, size, out=wrapped)
        return torch.add(self._bases[kind][:rows], positions, out=index).view(-1)

    def move(self, source: int, target: int) -> None:
        """Copy the contents of one slot to another."""
        for tensor in self.tensors():
            tensor[target].copy_(tensor[source])

    def clear(self, row: int) -> None:
        """Overwrite a slot with zeros."""
        for tensor in self.tensors():
            tensor[row].zero_()

    def tensors(self) -> list[torch.Tensor]:
        """Keys and values of all layers that have run."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def num_bytes(self) -> dict[torch.device, int]:
        """Bytes on each device."""
        nbytes: dict[torch.device, int] = {}
        for tensor in self.tensors():
            nbytes[tensor.device] = nbytes.get(tensor.device, 0) + tensor.nbytes
        return nbytes
