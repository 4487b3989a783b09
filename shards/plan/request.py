"""What a plan is asked: a model, an engine, devices, a batch; and what vLLM decides itself where it is not told."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shards.machine.hardware import CPU, GIB, Device, Link
from shards.model.quantization import Quantization, Storage
from shards.model.shape import ModelShape

MOST_DEVICES = 4096
"""More devices of all nodes together than these are not planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is to be put where. `devices` are those of each node; `batch_size` is that of each rank under fsdp.

    `kv_heads_only`: module engines keep keys and values of kv heads only, not as transformers' own Falcon expands them.
    `kv_dtype_bytes`: the width of a key or value, None for that of the weights. `kv_block_tokens`: the tokens of a
    sequence for which an engine takes up its cache at a time. `max_num_seqs` and `max_num_batched_tokens` are what vLLM
    takes at once, None where it decides. `mean_batch_size` and `mean_prompt_tokens` are those of all calls of a run,
    for its ceilings; None where all calls are alike.
    """

    shape: ModelShape
    engine: str
    devices: int = 1
    num_nodes: int = 1
    dtype_bytes: int = 2
    quantization: Quantization | None = None
    batch_size: int = 1
    mean_batch_size: float | None = None
    prompt_tokens: int = 512
    mean_prompt_tokens: float | None = None
    max_new_tokens: int = 128
    device: Device = CPU
    link: Link | None = None
    kv_heads_only: bool = True
    reshard_after_forward: bool = True
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    kv_dtype_bytes: int | None = None
    kv_block_tokens: int = 1
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None

    @property
    def storage(self) -> Storage:
        return Storage(self.dtype_bytes, self.quantization)

    @property
    def num_devices(self) -> int:
        """Devices that hold parts of the model: transformers on a CPU is one process, and so one device."""
        alone = self.engine == "transformers" and self.device.kind == "cpu"
        return 1 if alone else self.devices * self.num_nodes

    @property
    def tensor_parallel_size(self) -> int:
        return self.num_devices if self.engine in ("deepspeed", "tensor_parallel", "vllm") else 1

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    def kept_tokens(self, window: int | None) -> int:
        """Tokens of a sequence for which a layer has cache at its end. A window's last token is not read again, and it
        does not begin where a block does."""
        if window is None:
            return self._in_blocks(self.context)
        more = self.kv_block_tokens if self.kv_block_tokens > 1 else 0
        return min(self._in_blocks(self.context), self._in_blocks(window - 1) + more)

    def lost_tokens(self, window: int | None) -> int:
        """Tokens of a prompt for which a layer has no cache any more once it was read."""
        return max(0, self._in_blocks(self.prompt_tokens) - self.kept_tokens(window))

    def _in_blocks(self, tokens: int) -> int:
        return ceil(tokens / self.kv_block_tokens) * self.kv_block_tokens

    @property
    def sequences(self) -> int:
        """How many sequences vLLM takes at once."""
        return self.max_num_seqs or min(_at_once(self)[0], self.batched_tokens)

    @property
    def batched_tokens(self) -> int:
        """How many tokens vLLM puts into one step."""
        if self.max_num_batched_tokens:
            return self.max_num_batched_tokens
        sequences, tokens = _at_once(self)
        longest = self.shape.max_position_embeddings or tokens
        return min((self.max_num_seqs or sequences) * longest, tokens)


def _at_once(request: PlanRequest) -> tuple[int, int]:
    """Sequences and tokens of a step if vLLM is not told: get_batch_defaults in vllm/engine/arg_utils.py."""
    device = request.device
    if device.kind == "cpu":
        return 256 * request.num_devices, 4096 * request.num_devices
    is_large = (device.capacity_bytes or 0) >= 70 * GIB and "a100" not in device.name.lower()
    return (1024, 16384) if is_large else (256, 8192)
