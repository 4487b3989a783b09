"""The configuration of a run as dataclasses. Standard library only: a worker needs no Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from shards.errors import UserError

MISSING: Any = "???"  # how OmegaConf spells a mandatory value


class ConfigError(UserError):
    """A value of the configuration is wrong."""


class Precision(Enum):
    """Data type of weights and activations, by torch's name."""

    fp32 = "float32"
    fp16 = "float16"
    bf16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes of one value."""
        return 4 if self is Precision.fp32 else 2


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
    """What every engine has. The class variables say how it runs, for code that must not import the engine."""

    one_process_per_device: ClassVar[bool] = True  # False: one process, and the engine spreads over the devices itself
    data_parallel: ClassVar[bool] = False  # True: every rank answers its own part of the prompts
    continuous_batching: ClassVar[bool] = False  # True: the engine is given the whole prompt set in one call
    packages: ClassVar[tuple[str, ...]] = ()  # modules that must import; the extra of the same name installs them

    name: str = MISSING
    python: str | None = None  # interpreter of another environment to run this engine in


@dataclass
class DummyConfig(BackendConfig):
    """An engine without weights that counts upwards: for trying configurations, launchers and reports."""

    data_parallel: ClassVar[bool] = True

    name: str = "dummy"
    step_s: float = 0.0  # time that a decode step takes
    fail_at: str = ""  # what the last rank does: "load", "generate" raise there, "hang" never returns from generate
    fail_after: int = 0  # calls of generate that go well before
    memory_batch: int | None = None  # the largest batch for which its memory is enough


@dataclass
class TransformersConfig(BackendConfig):
    one_process_per_device: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate")

    name: str = "transformers"
    device_map: str = "auto"  # accelerate's strategy for several GPUs


@dataclass
class FsdpConfig(BackendConfig):
    data_parallel: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "lightning")

    name: str = "fsdp"
    reshard_after_forward: bool = True  # False keeps gathered weights: fast, and no memory saved


@dataclass
class DeepSpeedConfig(BackendConfig):
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "deepspeed")

    name: str = "deepspeed"
    kernel_inject: bool = False  # refused where DeepSpeed's kernels do not apply
    max_out_tokens: int | None = None  # None: as many as the model has positions


@dataclass
class TensorParallelConfig(BackendConfig):
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    name: str = "tensor_parallel"


@dataclass
class VllmConfig(BackendConfig):
    one_process_per_device: ClassVar[bool] = False
    continuous_batching: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("torch", "vllm")

    name: str = "vllm"
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    enforce_eager: bool | None = None  # None: CUDA graphs on GPUs, eager on a CPU
    load_format: str = "auto"
    distributed_executor_backend: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further arguments of vllm.LLM


BACKENDS: dict[str, type[BackendConfig]] = {
    "dummy": DummyConfig,
    "fsdp": FsdpConfig,
    "deepspeed": DeepSpeedConfig,
    "tensor_parallel": TensorParallelConfig,
    "vllm": VllmConfig,
    "transformers": TransformersConfig,
}


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
    path: str | None = None  # .txt or - (stdin): a prompt a line; .jsonl: an object with "prompt" a line
    count: int | None = None  # synthetic: number of prompts
    input_tokens: int | None = None  # synthetic: exact length of each prompt
    output_tokens: int | None = None  # synthetic: exact number of new tokens, EOS ignored


@dataclass
class SamplingConfig:
    max_new_tokens: int = 32
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    ignore_eos: bool = False


@dataclass
class MeasureConfig:
    batch_size: int = 4  # prompts a call; for a data-parallel engine on each rank
    warmup: int = 1  # batches that are run and not counted
    repeats: int = 3  # times that the whole prompt set is answered
    find_batch_size: bool = False  # first try which batch is the largest that fits


@dataclass
class LaunchConfig:
    """Who starts the ranks."""

    name: str = "local"  # local | slurm
    wait: bool = True  # slurm: follow the job to its end; False: return once it is submitted
    poll_s: float = 2.0  # slurm: time between two looks at the queue
    rendezvous: str | None = None  # local, several nodes: host:port of the first node, the same on all of them
    node_rank: int | None = None  # local, several nodes: the number of this node, from 0


@dataclass
class ClusterConfig:
    """What a SLURM wants to be told; None and empty leave a line out. Times as SLURM writes them, in quotes."""

    name: str = "default"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    gpus_flag: str = "gpus-per-node"  # gpus-per-node | gres | none
    gpu_type: str | None = None  # asked for as gpus-per-node=TYPE:N or gres=gpu:TYPE:N
    device: str | None = None  # the card as `python -m launcher.plan` names it, for the plan
    cpus_per_task: int | None = None  # None: 4 for each card of a task, 1 where there are none
    mem: str | None = None
    time: str | None = None
    exclusive: bool = False
    signal_s: int = 90  # warning before the time limit; 0: none
    requeue: bool = True
    max_requeues: int = 10
    array_limit: int = 4  # jobs of a sweep that run at once
    extra: list[str] = field(default_factory=list)  # further options of sbatch, as --mail-type=END
    srun: list[str] = field(default_factory=list)  # further options of srun, as --mpi=none
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)  # lines of shell before the ranks
    container: list[str] = field(default_factory=list)  # words before the interpreter, as apptainer exec --nv image.sif
    environment: dict[str, str] = field(default_factory=dict)
    python: str | None = None  # interpreter on the nodes; None: the one that submits, in a container python3


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
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    output_dir: str = "runs"
    resume: bool = False
    run_dir: str | None = None
    hang_timeout_s: float = 600.0
    timeout_s: float = 0.0
    dry_run: bool = False

    @property
    def num_devices(self) -> int:
        """Devices of all nodes together."""
        return self.devices * self.num_nodes

    @property
    def world_size(self) -> int:
        """Ranks (processes): one for each device, or one that spreads over the devices of a single node by itself."""
        is_rank_per_device = self.backend.one_process_per_device or self.num_nodes > 1
        return self.num_devices if is_rank_per_device else self.num_nodes


HOW_IT_IS_RUN = ("output_dir", "resume", "run_dir", "hang_timeout_s", "timeout_s", "dry_run", "launch", "cluster")
"""The keys that do not say what is run: two configurations that differ in nothing else are one point."""
