"""Translate a RunConfig into vLLM's environment and arguments."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.backends.vllm.engine import adapter_slots
from launcher.backends.vllm.extra import ONLINE
from launcher.config.parts.formats import Weights
from launcher.config.parts.speculative import DRAFT
from shards.checkpoint.adapter_config import factor_shapes
from shards.engines.vllm import adapted_modules, adapter_rank
from shards.machine.hardware import GIB

if TYPE_CHECKING:
    from launcher.backends.vllm.engine import VllmConfig
    from launcher.config.schema import RunConfig
    from shards.untrusted_files import JsonObject

WORKER = "launcher.backends.vllm.worker.WorkerMemory"


def environment(config: RunConfig, on_cpu: bool) -> dict[str, str]:
    """Environment variables for vLLM, set unless the user has set them."""
    variables = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "SPT_NOENV": "1",  # renamed workers keep their environment readable: a run's processes are found by it
    }
    if on_cpu or config.devices * config.num_nodes == 1:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # starts seconds sooner
    if on_cpu:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # "auto" needs a NUMA node for each worker
    if on_cpu and config.backend.enforce_eager is not False:  # type: ignore[attr-defined]
        variables["TORCH_COMPILE_DISABLE"] = "1"  # even eager mode compiles a function of the vocabulary
    return variables


def arguments(
    config: RunConfig, folder: Path, external: bool, on_cpu: bool, pool: int | None, offloaded_bytes: int = 0
) -> JsonObject:
    """The arguments of vllm.LLM for a run with `pool` bytes of KV cache and `offloaded_bytes` of weights in main memory
    for each worker. `backend.extra` takes precedence."""
    options: VllmConfig = config.backend  # type: ignore[assignment]
    methods = {name: method for method, name in ONLINE.items()}
    values: JsonObject = {
        "model": str(folder),
        "tensor_parallel_size": config.devices,
        "dtype": config.precision.value,
        "seed": config.seed,
        "trust_remote_code": config.model.trust_remote_code,
        "load_format": options.load_format,
        "max_model_len": options.max_model_len or -1,  # -1: as many as fit the KV cache
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enforce_eager": on_cpu,
        "skip_tokenizer_init": True,
        "worker_extension_cls": WORKER,
    }
    if external:
        values["tensor_parallel_size"] = config.devices * config.num_nodes
        values["distributed_executor_backend"] = "external_launcher"
    if config.model.weights is Weights.random:
        values["load_format"] = "dummy"
    optional = {
        "enforce_eager": options.enforce_eager,
        "quantization": methods.get(config.quantization.name),
        "kv_cache_memory_bytes": pool,
        "cpu_offload_gb": offloaded_bytes / GIB or None,
        "max_num_seqs": options.max_num_seqs,
        "distributed_executor_backend": options.distributed_executor_backend,
    }
    values |= {name: value for name, value in optional.items() if value is not None}
    return values | speculation(config) | adapters(config, on_cpu) | options.extra


def speculation(config: RunConfig) -> JsonObject:
    """The arguments for speculative decoding, with statistics on so that vLLM counts draft tokens."""
    speculative = config.speculative
    if not speculative.is_on:
        return {}
    settings: JsonObject = {"num_speculative_tokens": speculative.tokens}
    if speculative.name == DRAFT:
        settings |= {"method": "draft_model", "model": speculative.model}
    else:
        settings |= {
            "method": "ngram",
            "prompt_lookup_max": speculative.ngram_max,
            "prompt_lookup_min": speculative.ngram_min,
        }
    return {"speculative_config": settings, "disable_log_stats": False}


def adapters(config: RunConfig, on_cpu: bool) -> JsonObject:
    """The arguments for unmerged adapters: room for all of them at once, in the modules that they adapt."""
    folders = config.adapter.beside
    if not folders:
        return {}
    shapes = [factor_shapes(Path(folder)) for folder in folders]
    return {
        "enable_lora": True,
        "max_loras": adapter_slots(config, not on_cpu),
        "max_lora_rank": adapter_rank(shapes),
        "lora_target_modules": sorted(adapted_modules(shapes)),
    }


def adapter_requests(config: RunConfig) -> dict[str | None, Any]:
    """The LoRARequest of each adapter by its name; under None the one for prompts that name none, if there is one."""
    wanted = config.adapter
    folders: dict[str | None, str] = dict(wanted.paths.items())
    if wanted.path is not None:
        folders[None] = wanted.path
    if not folders:
        return {}
    request = importlib.import_module("vllm.lora.request").LoRARequest
    return {name: request(name or "adapter", place, path) for place, (name, path) in enumerate(folders.items(), 1)}


def refusal(error: ValueError) -> str:
    """The reason why vLLM refuses its arguments, with the name of the argument if pydantic knows it."""
    problems: list[JsonObject] = getattr(error, "errors", list)()
    if not problems:
        return str(error)
    return ": ".join(filter(None, (".".join(map(str, problems[0]["loc"])), problems[0]["msg"])))
