"""A request for a plan (model, engine, devices, batch), and the interface of an engine to the planner."""

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
"""The largest number of devices, over all nodes, that is planned."""


Offload = Literal["cpu", "disk"]
"""The storage of weights that are sent to a device for each pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A model to be placed on devices. `devices` is the number on each node; `batch_size` is per rank if every rank
    answers its own prompts.

    `mean_batch_size` and `mean_prompt_tokens` are means over all calls of a run, for the speed limits; None if all
    calls are alike. `mixed_bytes` is the width of products and of the cache if it differs from that of the weights. A
    step checks at most `guessed_tokens` draft tokens of each sequence, from the model `draft` or from prompt lookup.
    `alternatives` are the engines that a hint may suggest.
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
        """The width of activations, and of keys and values."""
        return self.mixed_bytes or self.dtype_bytes

    @property
    def storage(self) -> Storage:
        return Storage(self.dtype_bytes, self.quantization)

    @property
    def num_devices(self) -> int:
        """The number of devices that hold parts of the model."""
        return self.engine.num_devices(self)

    @property
    def tensor_parallel_size(self) -> int:
        """The number of devices that share every layer."""
        return self.engine.tensor_parallel_size(self)

    @property
    def capacity_bytes(self) -> int | None:
        """Memory of each device, None if not known. The devices of a CPU run share the host's memory."""
        capacity = self.device.capacity_bytes
        if capacity is not None and self.device.kind == "cpu":
            return capacity // self.devices
        return capacity

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    @property
    def slot_tokens(self) -> int:
        """The most tokens of a sequence, draft tokens included."""
        return self.context + self.guessed_tokens

    def kept_tokens(self, window: int | None) -> int:
        """Tokens of a sequence that a layer's cache holds at its end. A window need not begin at the start of a
        block."""
        whole = self._in_blocks(self.slot_tokens)
        if window is None:
            return whole
        block = self.engine.block_tokens
        kept = self._in_blocks(self.engine.window_tokens(window) + self.guessed_tokens)
        if block > 1:
            kept += block
        return min(whole, kept)

    def lost_tokens(self, window: int | None) -> int:
        """Tokens of a prompt that a layer's cache has dropped after reading it."""
        return max(0, self._in_blocks(self.prompt_tokens) - self.kept_tokens(window))

    def _in_blocks(self, tokens: int) -> int:
        block = self.engine.block_tokens
        return ceil(tokens / block) * block


class EnginePlanner(ABC):
    """An engine as the planner sees it: the methods answer the planner's questions, the fields are the engine's own
    options.

    One frozen dataclass for each engine, in `shards/engines`. Bytes are per device unless stated otherwise.
    """

    __slots__ = ()

    name: ClassVar[str]
    plain_only: ClassVar[str] = ""  # why it does not run a quantization that `runs` rejects
    mixes_precision: ClassVar[bool] = False  # True: weights in fp32, multiplied under autocast in a narrower type
    offloads: ClassVar[tuple[Offload, ...]] = ()  # storage for weights that are sent to a device in each pass
    one_process: ClassVar[bool] = False  # True: one process holds all devices, so there is no communicator
    is_monotone: ClassVar[bool] = False  # True: from two on, more devices never need more memory each

    @property
    def block_tokens(self) -> int:
        """The number of tokens by which the cache of a sequence grows."""
        return 1

    @property
    def has_slots(self) -> bool:
        """True if the cache has room for all sequences of a batch at full length from the start."""
        return False

    def window_tokens(self, window: int) -> int:
        """Tokens that are kept for a sliding window: its oldest one is not read again."""
        return window - 1

    def runs(self, quantization: Quantization) -> bool:
        """True if the engine supports weights stored in this format."""
        return False

    def is_offered(self, quantization: Quantization | None) -> bool:
        """True if a hint may suggest this engine for weights in this format; None means plain weights."""
        return quantization is not None and self.runs(quantization)

    def settled(self, request: PlanRequest) -> EnginePlanner:
        """The engine after the plan has decided the options that are left to it, as far as possible."""
        return self

    def settings(self) -> dict[str, int]:
        """The decided options that a rank needs."""
        return {}

    def advice(self, request: PlanRequest) -> str | None:
        """An option that would make the request faster, and fits."""
        return None

    @abstractmethod
    def refusal(self, request: PlanRequest) -> str | None:
        """The reason why the engine cannot cut the model like this, None if it can."""

    def num_devices(self, request: PlanRequest) -> int:
        """The number of devices that hold parts of the model."""
        return request.devices * request.num_nodes

    def tensor_parallel_size(self, request: PlanRequest) -> int:
        """The number of devices that share every layer; 1 if each has its own layers or weights."""
        return 1

    def most_devices(self, request: PlanRequest) -> int:
        """The largest number of devices worth trying."""
        return request.shape.num_attention_heads

    @abstractmethod
    def layout(self, request: PlanRequest, ends_only: bool) -> Layout:
        """The cut of the model, with exact bytes of parameters. `ends_only`: only the first and the last rank, for an
        engine that cuts every layer; one of them is always the fullest."""

    def offloaded(self, request: PlanRequest, layout: Layout) -> Layout:
        """The layout of a request with offload: all parameters are in main memory or on disk."""
        nothing = (0,) * len(layout.parameter_bytes)
        buffers = layout.buffer_bytes + self.streamed_bytes(request)
        return replace(layout, parameter_bytes=nothing, buffer_bytes=buffers, offloaded_bytes=layout.parameter_bytes)

    def factors(self, shape: ModelShape, adapters: Sequence[Factors]) -> tuple[Parameter, ...]:
        """Parameters that an unmerged adapter adds: its factors, cut like their matrices."""
        return factor_parameters(shape, adapters)

    def sent_bytes(self, request: PlanRequest, layout: Layout) -> int:
        """Offloaded bytes that each device is sent in every pass."""
        return max(layout.offloaded_bytes, default=0)

    def streamed_bytes(self, request: PlanRequest) -> int:
        """The most bytes of offloaded parameters that are on a device at a time."""
        return 0

    def kv_heads(self, request: PlanRequest) -> int:
        """The number of heads of one layer whose keys and values a device keeps."""
        return max(1, request.shape.num_key_value_heads // request.tensor_parallel_size)

    def kv_value_bytes(self, request: PlanRequest) -> int:
        """The width of a key or value."""
        return request.product_bytes

    def step_tokens(self, request: PlanRequest) -> int:
        """Prompt tokens that layers with a window hold in addition to it while a step reads them."""
        return 0

    def unsliced_bytes(self, request: PlanRequest, first: int, end: int) -> int:
        """Bytes of keys and values outside the windows of the layers [first, end) that prompts leave allocated."""
        return 0

    def pool(self, request: PlanRequest) -> Pool | None:
        """The memory reserved for keys and values; None if it grows with the batch."""
        return None

    def smaller_pool(self, missing_bytes: int) -> tuple[EnginePlanner, str] | None:
        """The engine with a pool smaller by `missing_bytes`, and the option for it; None if the pool has no configured
        size."""
        return None

    @abstractmethod
    def activation_bytes(self, request: PlanRequest) -> int:
        """An estimate of the largest set of temporaries."""

    @abstractmethod
    def overhead_bytes(self, request: PlanRequest) -> int:
        """Memory of the driver and the engine outside the engine's tensors."""

    def packing_bytes(self, request: PlanRequest) -> int:
        """Temporary bytes while weights are packed, in the memory that holds them."""
        return 0

    @abstractmethod
    def load_host_bytes(self, request: PlanRequest) -> int | None:
        """Peak anonymous memory of the host of one node while loading; None if not known."""

    def scheme(self, request: PlanRequest) -> Scheme | None:
        """The way in which the devices share a step; None for an engine that does no work."""
        if request.tensor_parallel_size > 1:
            return "split"
        return "pipeline"

    def traffic(self, request: PlanRequest) -> Traffic:
        """Communication in one pass."""
        return Traffic()

    def unread_bytes(self, request: PlanRequest, table: int) -> int:
        """Bytes of an embedding of `table` bytes that the device holds but a decode step does not read."""
        if request.shape.tied:
            return 0
        return table // request.tensor_parallel_size
