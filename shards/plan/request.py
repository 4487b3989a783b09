"""A request for a plan (model, engine, devices, batch), and the questions that the planner has for an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Literal

from shards.machine.hardware import CPU, Device, Link
from shards.model.quantization import Quantization, Storage
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Factors, factor_parameters
from shards.plan.layout import Layout, Pool, Traffic
from shards.plan.roofline import Scheme

MOST_DEVICES = 4096
"""More devices of all nodes together than these are not planned."""


Offload = Literal["cpu", "disk"]
"""Where weights lie that a device is sent for each pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A model to be put on devices. `devices` are those of each node; `batch_size` is that of each rank where every
    rank answers prompts of its own.

    `mean_batch_size` and `mean_prompt_tokens` are those of all calls of a run, for its ceilings; None where all calls
    are alike. `mixed_bytes` is the width of products and of the cache where it is not that of the weights. In a step
    `guessed_tokens` of each sequence are checked at most, which `draft` has guessed or which were looked up.
    `alternatives` are the engines that a hint may name.
    """

    shape: ModelShape
    engine: EnginePlanner
    devices: int = 1
    num_nodes: int = 1
    dtype_bytes: int = 2
    mixed_bytes: int | None = None
    quantization: Quantization | None = None
    offload: Offload | None = None
    batch_size: int = 1
    mean_batch_size: float | None = None
    prompt_tokens: int = 512
    mean_prompt_tokens: float | None = None
    max_new_tokens: int = 128
    guessed_tokens: int = 0
    draft: ModelShape | None = None
    device: Device = CPU
    link: Link | None = None
    alternatives: tuple[EnginePlanner, ...] = ()

    @property
    def product_bytes(self) -> int:
        """The width of what layers make, and of keys and values."""
        return self.mixed_bytes or self.dtype_bytes

    @property
    def storage(self) -> Storage:
        return Storage(self.dtype_bytes, self.quantization)

    @property
    def num_devices(self) -> int:
        """Devices that hold parts of the model."""
        return self.engine.num_devices(self)

    @property
    def tensor_parallel_size(self) -> int:
        """Devices that share every layer."""
        return self.engine.tensor_parallel_size(self)

    @property
    def capacity_bytes(self) -> int | None:
        """Memory of each device, None where it is not known; devices without memory of their own share the host's."""
        capacity = self.device.capacity_bytes
        if capacity is not None and self.device.kind == "cpu":
            return capacity // self.devices
        return capacity

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    @property
    def slot_tokens(self) -> int:
        """Tokens of a sequence at most, with guesses behind it."""
        return self.context + self.guessed_tokens

    def kept_tokens(self, window: int | None) -> int:
        """Tokens of a sequence for which a layer has cache at its end. A window does not begin where a block does."""
        whole = self._in_blocks(self.slot_tokens)
        if window is None:
            return whole
        block = self.engine.block_tokens
        kept = self._in_blocks(self.engine.window_tokens(window) + self.guessed_tokens)
        if block > 1:
            kept += block
        return min(whole, kept)

    def lost_tokens(self, window: int | None) -> int:
        """Tokens of a prompt for which a layer has no cache any more once it was read."""
        return max(0, self._in_blocks(self.prompt_tokens) - self.kept_tokens(window))

    def _in_blocks(self, tokens: int) -> int:
        block = self.engine.block_tokens
        return ceil(tokens / block) * block


class EnginePlanner(ABC):
    """An engine as the planner knows it: the questions that a plan asks of it, and as fields the options of its own.

    One frozen dataclass for each engine, in `shards/engines`. Bytes are those of one device where nothing else is said.
    """

    __slots__ = ()

    name: ClassVar[str]
    plain_only: ClassVar[str] = ""  # why it runs no quantization, or not one that `runs` denies
    mixes_precision: ClassVar[bool] = False  # True: weights in fp32, multiplied under autocast in a narrower type
    offloads: ClassVar[tuple[Offload, ...]] = ()  # where it can leave weights that a device is sent for each pass
    one_process: ClassVar[bool] = False  # True: one process holds all devices, so there is no communicator
    is_monotone: ClassVar[bool] = False  # True: from two on, more devices never need more memory each

    @property
    def block_tokens(self) -> int:
        """Tokens of a sequence for which the cache grows at a time."""
        return 1

    @property
    def has_slots(self) -> bool:
        """The cache has room for all sequences of a batch at full length from the first."""
        return False

    def window_tokens(self, window: int) -> int:
        """Tokens that are kept for a window: its last is not read again."""
        return window - 1

    def runs(self, quantization: Quantization) -> bool:
        """The engine has layers for weights that are stored so."""
        return False

    def is_offered(self, quantization: Quantization | None) -> bool:
        """A hint may name this engine for weights that are stored so; None for plain ones."""
        return quantization is not None and self.runs(quantization)

    def settled(self, request: PlanRequest) -> EnginePlanner:
        """The engine with what its options leave to the plan decided, as far as that can be."""
        return self

    def settings(self) -> dict[str, int]:
        """The decided options that a rank has to know."""
        return {}

    def advice(self, request: PlanRequest) -> str | None:
        """An option with which the request would be faster, and fits."""
        return None

    @abstractmethod
    def refusal(self, request: PlanRequest) -> str | None:
        """The reason for which the engine cannot cut the model so, None if it can."""

    def num_devices(self, request: PlanRequest) -> int:
        """Devices that hold parts of the model."""
        return request.devices * request.num_nodes

    def tensor_parallel_size(self, request: PlanRequest) -> int:
        """Devices that share every layer; 1 where each has layers or weights of its own."""
        return 1

    def most_devices(self, request: PlanRequest) -> int:
        """The largest number of devices that is worth trying."""
        return request.shape.num_attention_heads

    @abstractmethod
    def layout(self, request: PlanRequest, ends_only: bool) -> Layout:
        """The cut of the model, bytes of parameters exact. `ends_only`: of the first and the last rank where the engine
        cuts every layer, one of which is always the fullest."""

    def offloaded(self, request: PlanRequest, layout: Layout) -> Layout:
        """The layout of a request with offload: all parameters lie elsewhere."""
        nothing = (0,) * len(layout.parameter_bytes)
        buffers = layout.buffer_bytes + self.streamed_bytes(request)
        return replace(layout, parameter_bytes=nothing, buffer_bytes=buffers, offloaded_bytes=layout.parameter_bytes)

    def factors(self, shape: ModelShape, adapters: Sequence[Factors]) -> tuple[Parameter, ...]:
        """Parameters that an adapter beside the weights adds: its factors, cut like the matrices that they are for."""
        return factor_parameters(shape, adapters)

    def sent_bytes(self, request: PlanRequest, layout: Layout) -> int:
        """Offloaded bytes that each device is sent in every pass."""
        return max(layout.offloaded_bytes, default=0)

    def streamed_bytes(self, request: PlanRequest) -> int:
        """The most bytes of offloaded parameters that a device has at a time."""
        return 0

    def kv_heads(self, request: PlanRequest) -> int:
        """Heads of one layer whose keys and values a device keeps."""
        return max(1, request.shape.num_key_value_heads // request.tensor_parallel_size)

    def kv_value_bytes(self, request: PlanRequest) -> int:
        """The width of a key or value."""
        return request.product_bytes

    def step_tokens(self, request: PlanRequest) -> int:
        """Tokens of prompts that layers with a window hold beside it while one step reads them."""
        return 0

    def unsliced_bytes(self, request: PlanRequest, first: int, end: int) -> int:
        """Keys and values outside the windows of the layers from `first` to before `end` that prompts leave behind."""
        return 0

    def pool(self, request: PlanRequest) -> Pool | None:
        """The memory set aside for keys and values; None where it grows with the batch."""
        return None

    def smaller_pool(self, missing_bytes: int) -> tuple[EnginePlanner, str] | None:
        """The engine with a pool of so many bytes less, and the option that asks for it; None where none was told."""
        return None

    @abstractmethod
    def activation_bytes(self, request: PlanRequest) -> int:
        """Estimate of the largest set of temporaries."""

    @abstractmethod
    def overhead_bytes(self, request: PlanRequest) -> int:
        """Memory of driver and engine outside the engine's tensors."""

    def packing_bytes(self, request: PlanRequest) -> int:
        """Bytes beside the weights while they are packed, in the memory that has them."""
        return 0

    @abstractmethod
    def load_host_bytes(self, request: PlanRequest) -> int | None:
        """Anonymous memory of the host of one node at the worst moment of loading; None where it is not known."""

    def scheme(self, request: PlanRequest) -> Scheme | None:
        """The way in which the devices share a step; None for an engine that does no work."""
        if request.tensor_parallel_size > 1:
            return "split"
        return "pipeline"

    def traffic(self, request: PlanRequest) -> Traffic:
        """Work of the link in one pass."""
        return Traffic()

    def unread_bytes(self, request: PlanRequest, table: int) -> int:
        """Bytes of an embedding of `table` bytes that the device holds and a decode step does not read."""
        if request.shape.tied:
            return 0
        return table // request.tensor_parallel_size
