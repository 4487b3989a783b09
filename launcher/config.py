"""The configuration of a run as dataclasses. OmegaConf ends here: nothing past this module sees a DictConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Precision(Enum):
    """Data type of weights and activations."""

    fp32 = "float32"
    fp16 = "float16"
    bf16 = "bfloat16"


class Accelerator(Enum):
    """Where the ranks run; `auto` is CUDA where there is a GPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Weights(Enum):
    """`auto` reads the checkpoint; `random` makes values of the same shapes on the device that holds them."""

    auto = "auto"
    random = "random"


@dataclass
class BackendConfig:
    """What every engine has."""

    name: str = MISSING
    python: str | None = None  # interpreter of another environment to run this engine in


@dataclass
class DummyConfig(BackendConfig):
    name: str = "dummy"
    step_s: float = 0.0  # time that a decode step takes
    fail_at: str = ""  # "" or a stage: raise there, to try out how failures are reported


@dataclass
class TransformersConfig(BackendConfig):
    name: str = "transformers"
    device_map: str = "auto"


@dataclass
class FsdpConfig(BackendConfig):
    name: str = "fsdp"
    reshard_after_forward: bool = True


@dataclass
class DeepSpeedConfig(BackendConfig):
    name: str = "deepspeed"
    kernel_inject: bool = False
    max_out_tokens: int | None = None  # None: as long as the prompts and new tokens need


@dataclass
class VllmConfig(BackendConfig):
    name: str = "vllm"
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    enforce_eager: bool = False
    load_format: str = "auto"
    distributed_executor_backend: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of vllm.LLM


@dataclass
class ModelConfig:
    name: str = MISSING
    path: str = MISSING  # a folder, a hub id, or embedded:NAME
    revision: str | None = None
    weights: Weights = Weights.auto
    trust_remote_code: bool = False
    config: dict[str, Any] | None = None  # a transformers config, for a model that is not on this machine


@dataclass
class PromptsConfig:
    name: str = MISSING
    texts: list[str] | None = None
    path: str | None = None
    count: int | None = None
    input_tokens: int | None = None


@dataclass
class SamplingConfig:
    max_new_tokens: int = 32
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    ignore_eos: bool = False


@dataclass
class MeasureConfig:
    batch_size: int = 4
    warmup: int = 1  # batches that are run and not counted
    repeats: int = 3  # times that the whole prompt set is answered


@dataclass
class RunConfig:
    backend: BackendConfig = MISSING
    model: ModelConfig = MISSING
    prompts: PromptsConfig = MISSING
    precision: Precision = Precision.fp32
    devices: int = 2
    num_nodes: int = 1
    accelerator: Accelerator = Accelerator.auto
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    output_dir: str = "runs"
    dry_run: bool = False
