"""vLLM: tensor parallelism with an even split, a paged pool of keys and values, and continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

from shards.engines.base import cut_layout, driver_bytes, layer_activation_bytes, tensor_parallel_traffic, uneven_heads
from shards.errors import PlanError
from shards.machine.hardware import GIB, MIB
from shards.model.quantization import Quantization
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Factors, Pieces, parameter_kinds
from shards.plan.layout import Layout, Pool, Traffic
from shards.plan.request import EnginePlanner, Offload, PlanRequest

_VOCABULARY_PADDING = 64  # vllm/model_executor/layers/vocab_parallel_embedding.py
_GRAPHS_BYTES = 768 * MIB

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks in vllm/config/lora.py
ADAPTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # vLLM's Falcon supports no adapters
PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Groups of matrices that vLLM joins into one module, in these families."""

NOT_READ = "no longer has bitsandbytes, nor GPTQ that is asymmetric or has desc_act over groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmPlanner(EnginePlanner):
    """Options by vLLM's names. `kv_dtype_bytes`: the width of a key or value, None for that of the weights;
    `kv_block_tokens`: the tokens of a block of the cache; `max_num_seqs` and `max_num_batched_tokens`: the sequences
    and tokens of a step, None if vLLM decides; `adapter_slots`: the number of adapters for which memory is reserved."""

    name: ClassVar[str] = "vllm"
    plain_only: ClassVar[str] = f"vLLM {NOT_READ}"
    offloads: ClassVar[tuple[Offload, ...]] = ("cpu",)

    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    kv_dtype_bytes: int | None = None
    kv_block_tokens: int = 1
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    adapter_slots: int = 0

    @property
    def block_tokens(self) -> int:
        return self.kv_block_tokens

    def runs(self, quantization: Quantization) -> bool:
        """True if vLLM has kernels for a stored quantization.

        Source: AutoGPTQConfig.TYPE_MAP and normalize_and_validate_gptq_desc_act of release 0.32.
        """
        is_plain = not (quantization.ordered or quantization.zero_points)
        return quantization.fused and (is_plain or not quantization.name.startswith("gptq"))

    def is_offered(self, quantization: Quantization | None) -> bool:
        return quantization is None or self.runs(quantization)

    def refusal(self, request: PlanRequest) -> str | None:
        shape, n = request.shape, request.tensor_parallel_size
        if uneven := uneven_heads(request):
            return uneven
        kv_heads = shape.num_key_value_heads
        if kv_heads % n and n % kv_heads:
            return f"{kv_heads} key and value heads cannot be divided by {n} devices, as vllm needs."
        padded = padded_vocabulary(shape.vocab_size)
        for unit, count in (("inner MLP columns", shape.intermediate_size), ("rows of the padded vocabulary", padded)):
            if count % n:
                return f"{count} {unit} cannot be divided by {n} devices, as vllm needs."
        if shape.family in ("qwen2", "qwen3") and len(set(shape.windows)) > 1:
            return "vllm runs no Qwen of which only some layers have a sliding window."
        problem = self._quantized_misfit(request)
        if problem:
            return f"{problem}, as vllm needs."
        return None

    def _quantized_misfit(self, request: PlanRequest) -> str | None:
        """The reason why quantized layers cannot be split, None if they can."""
        if request.quantization is None:
            return None
        for parameter, _ in parameter_kinds(request.shape, request.storage):
            if not request.quantization.applies(parameter):
                continue
            for piece in self.pieces(request.shape, request.tensor_parallel_size, 0, parameter):
                if problem := request.quantization.misfit(parameter, piece):
                    return problem
        return None

    def tensor_parallel_size(self, request: PlanRequest) -> int:
        return request.num_devices

    def pieces(self, shape: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
        """An even split, with the vocabulary padded to 64 rows, and kv heads repeated if there are more ranks."""
        sizes, kv_heads = parameter.shape, max(1, shape.num_key_value_heads // n)
        if parameter.cut == "whole":
            return (sizes,)
        if parameter.cut == "row":
            return ((*sizes[:-1], sizes[-1] // n),)
        rows = {
            "embedding": padded_vocabulary(shape.vocab_size) // n,
            "head": padded_vocabulary(shape.vocab_size) // n,
            "key_value": kv_heads * shape.head_dim,
            "query_key_value": (shape.num_attention_heads // n + 2 * kv_heads) * shape.head_dim,
            "column": sizes[0] // n,
        }
        return ((rows[parameter.cut], *sizes[1:]),)

    def layout(self, request: PlanRequest, ends_only: bool) -> Layout:
        packed_bytes = 0
        if request.device.kind == "cpu":
            # Embedding and head are packed for its kernels, also tied ones, and both are kept
            # (vocab_parallel_embedding.py).
            rows = padded_vocabulary(request.shape.vocab_size)
            packed_bytes = 2 * rows // request.num_devices * request.shape.hidden_size * request.dtype_bytes
        return cut_layout(request, self.pieces, ends_only, packed_bytes)

    def offloaded(self, request: PlanRequest, layout: Layout) -> Layout:
        """The decoder layers are in main memory, which the GPU reads (vllm/model_executor/offloader/uva.py)."""
        shape = request.shape
        outside = replace(shape, parameters=tuple(p for p in shape.parameters if p.layer is None))
        resident = cut_layout(replace(request, shape=outside), self.pieces, False, layout.buffer_bytes)
        parts = resident.parameter_bytes[: len(layout.parameter_bytes)]
        elsewhere = tuple(whole - part for whole, part in zip(layout.parameter_bytes, parts, strict=True))
        return replace(layout, parameter_bytes=parts, offloaded_bytes=elsewhere)

    def factors(self, shape: ModelShape, adapters: Sequence[Factors]) -> tuple[Parameter, ...]:
        """Memory for `adapter_slots` of the largest rank, in each matrix of the adapted modules; in a packed module of
        vLLM for all of its parts (vllm/lora/layers)."""
        if shape.family not in ADAPTED_FAMILIES:
            known = ", ".join(ADAPTED_FAMILIES)
            raise PlanError(
                f"vllm keeps no adapter beside the weights of {shape.family}, but of {known}.",
                "backend=fsdp, which merges it",
            )
        inside = [p for p in shape.parameters if len(p.shape) == 2 and p.layer is not None]
        matrices = {p.name.removesuffix(".weight"): p for p in inside}
        for module, _ in (key for adapter in adapters for key in adapter):
            if module not in matrices:
                fact = f"An adapter is for {module}, which the model does not have or vllm adapts otherwise."
                raise PlanError(fact, "the adapter of this model, or backend=fsdp, which merges it")
        kinds, room = adapted_modules(adapters), self.adapter_slots * adapter_rank(adapters)
        packed = {part for group in PACKED if kinds & set(group) for part in group}
        added = []
        for module, matrix in matrices.items():
            if module.rpartition(".")[2] in kinds | packed:
                outputs, inputs = matrix.shape
                is_row = matrix.cut == "row"
                added.append(Parameter(f"{module}.weight_lora_a", (room, inputs), "row" if is_row else "whole"))
                added.append(Parameter(f"{module}.weight_lora_b", (outputs, room), "whole" if is_row else matrix.cut))
        return tuple(added)

    def kv_value_bytes(self, request: PlanRequest) -> int:
        return self.kv_dtype_bytes or request.dtype_bytes

    def step_tokens(self, request: PlanRequest) -> int:
        return self.batched_tokens(request)

    def pool(self, request: PlanRequest) -> Pool | None:
        return Pool(self.sequences(request), self.gpu_memory_utilization, self.kv_cache_memory_bytes)

    def smaller_pool(self, missing_bytes: int) -> tuple[EnginePlanner, str] | None:
        if self.kv_cache_memory_bytes is None:
            return None
        nbytes = self.kv_cache_memory_bytes - missing_bytes
        return replace(self, kv_cache_memory_bytes=nbytes), f"backend.kv_cache_memory_bytes={nbytes}"

    def activation_bytes(self, request: PlanRequest) -> int:
        """The tokens of a step through one layer, or the logits of its sequences, which also exist in fp32."""
        shape = request.shape
        layer = layer_activation_bytes(request, self.batched_tokens(request), shape.num_key_value_heads)
        logits = self.sequences(request) * shape.vocab_size * (request.dtype_bytes + 4)
        return max(layer, logits)

    def overhead_bytes(self, request: PlanRequest) -> int:
        if request.device.kind == "cpu":
            return 0
        return driver_bytes(request) + _GRAPHS_BYTES

    def load_host_bytes(self, request: PlanRequest) -> int | None:
        """Unknown: vLLM's own loaders (backend.load_format) map or read files."""
        return None

    def traffic(self, request: PlanRequest) -> Traffic:
        return tensor_parallel_traffic(request)

    def sequences(self, request: PlanRequest) -> int:
        """The most sequences of a step."""
        return self.max_num_seqs or min(_step_defaults(request)[0], self.batched_tokens(request))

    def batched_tokens(self, request: PlanRequest) -> int:
        """The most tokens of a step."""
        if self.max_num_batched_tokens:
            return self.max_num_batched_tokens
        sequences, tokens = _step_defaults(request)
        longest = request.shape.max_position_embeddings or tokens
        return min((self.max_num_seqs or sequences) * longest, tokens)


def adapted_modules(adapters: Sequence[Factors]) -> set[str]:
    """The last parts of the names of the adapted modules."""
    return {module.rpartition(".")[2] for adapter in adapters for module, _ in adapter}


def adapter_rank(adapters: Sequence[Factors]) -> int:
    """The rank for which vLLM reserves memory for each adapter: the next larger one with kernels."""
    largest = max(sizes[0] for adapter in adapters for (_, factor), sizes in adapter.items() if factor == "A")
    if largest > ADAPTER_RANKS[-1]:
        raise PlanError(f"An adapter has rank {largest}, and vllm takes {ADAPTER_RANKS[-1]} at most.", "backend=fsdp")
    return next(rank for rank in ADAPTER_RANKS if rank >= largest)


def padded_vocabulary(rows: int) -> int:
    """The rows of a vocabulary as vLLM pads them."""
    return ceil(rows / _VOCABULARY_PADDING) * _VOCABULARY_PADDING


def _step_defaults(request: PlanRequest) -> tuple[int, int]:
    """Sequences and tokens of a step if vLLM decides: get_batch_defaults in vllm/engine/arg_utils.py."""
    device = request.device
    if device.kind == "cpu":
        return 256 * request.num_devices, 4096 * request.num_devices
    is_large = (device.capacity_bytes or 0) >= 70 * GIB and "a100" not in device.name.lower()
    if is_large:
        return (1024, 16384)
    return (256, 8192)
