"""What a run means in vLLM's words: its environment and the arguments of `vllm.LLM`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from launcher.config.schema import ConfigError, VllmConfig
from shards.errors import PlanError
from shards.machine.hardware import GIB, MIB
from shards.model.shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.config.schema import RunConfig

WORKER = "launcher.backends.vllm.worker.WorkerMemory"
OURS = {
    "model": "model.path",
    "tensor_parallel_size": "devices",
    "dtype": "precision",
    "seed": "seed",
    "trust_remote_code": "model.trust_remote_code",
    "worker_extension_cls": "",
}


def environment(config: RunConfig, on_cpu: bool) -> dict[str, str]:
    """What makes vLLM start and run well, for variables that the user has not set."""
    found = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "SPT_NOENV": "1",  # workers rename themselves; their environment, by which a run is found, must stay readable
    }
    if on_cpu or config.devices * config.num_nodes == 1:
        found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # starts seconds sooner
    if on_cpu:
        found["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # "auto" wants a NUMA node for each worker
    if on_cpu and config.backend.enforce_eager is not False:  # type: ignore[attr-defined]
        found["TORCH_COMPILE_DISABLE"] = "1"  # eager mode compiles a function of the vocabulary all the same
    return found


def arguments(config: RunConfig, folder: Path, external: bool, on_cpu: bool, pool: int | None) -> dict[str, Any]:
    """The arguments of vllm.LLM for a run with `pool` bytes of KV cache a worker; those of `backend.extra` win."""
    options: VllmConfig = config.backend  # type: ignore[assignment]
    size = config.devices * (config.num_nodes if external else 1)
    optional = {
        "kv_cache_memory_bytes": pool,
        "max_num_seqs": options.max_num_seqs,
        "distributed_executor_backend": options.distributed_executor_backend
        or ("external_launcher" if external else None),
    }
    return {
        "model": str(folder),
        "tensor_parallel_size": size,
        "dtype": config.precision.value,
        "seed": config.seed,
        "trust_remote_code": config.model.trust_remote_code,
        "load_format": "dummy" if config.model.weights.name == "random" else options.load_format,
        "max_model_len": -1 if options.max_model_len is None else options.max_model_len,  # -1: what fits the cache
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
        "skip_tokenizer_init": True,
        "worker_extension_cls": WORKER,
        **{name: value for name, value in optional.items() if value is not None},
        **options.extra,
    }


def pool_bytes(config: RunConfig, fields: Mapping[str, Any], on_cpu: bool) -> int | None:
    """The KV cache that each worker is told to reserve; None where vLLM takes what `gpu_memory_utilization` leaves.

    On a CPU it is as large as 64 sequences of the model's context, but together not over a quarter of the memory that
    is free now: a run asks once, and its plan keeps the answer. At least 64 MiB, and a GiB where the shape of the model
    is not known. VLLM_CPU_KVCACHE_SPACE is vLLM's own variable, in GiB, which wins over what it is told.
    """
    asked: int | None = _option(config, "kv_cache_memory_bytes")
    if not on_cpu:
        return asked
    if (space := os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")).isdecimal():
        return int(space) * GIB
    if asked is not None:
        return asked
    try:
        shape = ModelShape.from_config(fields)
    except PlanError:
        return GIB
    size = config.devices * config.num_nodes
    heads = max(1, shape.num_key_value_heads // size)
    token_bytes = 2 * shape.num_layers * heads * shape.head_dim * config.precision.num_bytes
    context = _option(config, "max_model_len") or shape.max_position_embeddings or 2048
    wanted = (_option(config, "max_num_seqs") or 64) * context * token_bytes
    return max(64 * MIB, min(wanted, psutil.virtual_memory().available // 4 // size))


def _option(config: RunConfig, name: str) -> Any:
    """An option of the engine as vLLM is given it."""
    options: VllmConfig = config.backend  # type: ignore[assignment]
    return options.extra.get(name, getattr(options, name))


def refusal(error: ValueError) -> str:
    """What vLLM does not take, with the name of the argument where pydantic knows it."""
    problems: list[dict[str, Any]] = getattr(error, "errors", list)()
    if not problems:
        return str(error)
    return ": ".join(filter(None, (".".join(map(str, problems[0]["loc"])), problems[0]["msg"])))


def refuse_vllm(config: RunConfig) -> None:
    """ConfigError, before a process starts, for what is in `backend.extra` and vLLM does not take.

    Where its package cannot be read from here (in a container, on a node) the rank finds it.
    """
    if not isinstance(config.backend, VllmConfig) or not config.backend.extra:
        return
    package = installed_package(config.backend.python)
    if package is not None:
        check_extra(package, config.backend.extra)


def installed_package(python: str | None) -> Path | None:
    """The folder of the vLLM that an interpreter would import, found without importing it."""
    if python is None:
        spec = importlib.util.find_spec("vllm")
        return Path(spec.origin).parent if spec and spec.origin else None
    program = "import importlib.util as i; print(i.find_spec('vllm').origin)"
    try:
        asked = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(asked.stdout.strip()).parent


def accepted_arguments(package: Path) -> set[str]:
    """The arguments of vllm.LLM and vllm.EngineArgs, read from their source: importing vLLM takes seconds."""
    engine = _class_in(package / "engine" / "arg_utils.py", "EngineArgs")
    fields = {
        node.target.id for node in engine if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    [init] = (
        node.args
        for node in _class_in(package / "entrypoints" / "llm.py", "LLM")
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    return fields | {argument.arg for argument in (*init.args, *init.kwonlyargs)} - {"self"}


def _class_in(path: Path, name: str) -> list[ast.stmt]:
    """The statements of a class in a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def check_extra(package: Path, extra: Mapping[str, Any]) -> None:
    """ConfigError for a key of `backend.extra` that vllm.LLM does not have, or that the launcher itself sets."""
    known = accepted_arguments(package)
    own = {field.name for field in dataclasses.fields(VllmConfig)}
    for name, value in extra.items():
        if name in OURS:
            hint = f"{OURS[name]}=" if OURS[name] else "leave it out"
            raise ConfigError(f"backend.extra.{name} is set by the launcher.", hint)
        if name not in known:
            near = next(iter(difflib.get_close_matches(name, known, 1)), None)
            hint = f"{'backend' if near in own else 'backend.extra'}.{near}={value}"
            raise ConfigError(
                f"vLLM has no argument {name!r} (backend.extra.{name}).", hint if near else f"leave {name} out"
            )
