"""The configuration of a run as dataclasses. Standard library only: a worker needs no Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config.device import CostConfig, DeviceConfig
from launcher.config.parts.compiling import Compile
from launcher.config.parts.experiment import MISSING, ExperimentConfig
from launcher.config.parts.formats import AdapterConfig, WeightFormat, Weights
from launcher.config.parts.launching import ClusterConfig, LaunchConfig
from launcher.config.parts.serving import LoadConfig, ServerConfig, SloConfig
from launcher.config.parts.speculative import SpeculativeConfig
from launcher.config.parts.storage import Offload, Precision
from shards.errors import PlanError, UserError
from shards.machine.interpreter import pip_install
from shards.model.quantization import QUANTIZATIONS, Quantization
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_PREFILL_TOKENS = 2048  # prompt tokens per forward pass of a module engine with slots, at most


class ConfigError(UserError):
    """An invalid value of the configuration."""


class Accelerator(Enum):
    """The kind of device of the ranks; `auto` is CUDA if there is a GPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Scheduling(Enum):
    """When a prompt starts: as soon as a slot is free (continuous), or with the next batch, after the longest answer of
    the current one (static)."""

    continuous = "continuous"
    static = "static"


@dataclass
class BackendConfig:
    """Configuration and properties of an engine, available without importing the engine; each engine has a subclass.

    Fields are its options, class variables its properties. The methods are called in this order while a run is
    prepared."""

    implementation: ClassVar[str] = ""  # "module:Class" of its `launcher.backends.base.Backend`; only ranks import it
    planner_class: ClassVar[type[EnginePlanner] | None] = None  # None: no plan, its memory use is not modelled
    packages: ClassVar[tuple[str, ...]] = ()  # modules to import; module:name if attributes load lazily
    distributions: ClassVar[tuple[str, ...]] = ()  # PyPI names that differ from the module's
    pip_extra: ClassVar[str | None] = None  # extra of this project that installs the packages
    pip_finds_cpu_build: ClassVar[bool] = True  # False: without GPUs only scripts/setup.sh can install it
    one_process_per_device: ClassVar[bool] = True  # False: one process, which uses all devices itself
    joins_ranks: ClassVar[bool] = True  # False: cannot run as one of several ranks started by torchrun or srun
    data_parallel: ClassVar[bool] = False  # True: every rank answers its own part of the prompts
    continuous_batching: ClassVar[bool] = False  # True: one call gets the whole prompt set, the engine forms batches
    most_at_once_key: ClassVar[str | None] = None  # with continuous batching: the key that limits the batch size
    has_slots: ClassVar[bool] = False  # True: supports both values of measure.scheduling
    takes_load: ClassVar[bool] = False  # True: prompts can arrive over time, as `load` configures
    starts_servers: ClassVar[bool] = False  # True: it is a client of the server that `server` starts
    needs_device: ClassVar[bool] = True  # False: it uses no device of this machine
    needs_weights: ClassVar[bool] = True  # False: only the config and tokenizer of a model are read
    loads_by_name: ClassVar[bool] = False  # True: loads checkpoints by `shards.load`, with the model's tensor names
    speculates: ClassVar[bool] = False  # True: supports speculative decoding
    merges_adapters: ClassVar[bool] = False  # True: supports adapter.path, merged into the weights during loading
    takes_adapters: ClassVar[bool] = False  # True: supports adapter.merge=false, which keeps the LoRA factors separate
    names_adapters: ClassVar[bool] = False  # True: supports adapter.paths, with an adapter chosen by each prompt
    can_score: ClassVar[bool] = False  # True: supports measure.quality
    can_trace: ClassVar[bool] = False  # True: supports measure.profile
    is_reference: ClassVar[bool] = False  # True: the tokens of other engines are compared with its tokens
    own_random_weights: ClassVar[bool] = False  # True: its random weights differ from those of other engines
    quantizations: ClassVar[tuple[str, ...]] = ()  # supported values of `quantization`, applied to plain weights
    stored_weights: ClassVar[str] = "loads plain weights only"  # part of the error if `reads` refuses a checkpoint

    name: str = MISSING
    python: str | None = None  # interpreter of another environment to run this engine in

    @property
    def uses_devices(self) -> bool:
        """True if the engine, with these options, runs on devices of this machine."""
        return self.needs_device

    @property
    def uses_weights(self) -> bool:
        """True if the engine, with these options, needs the weights of the model on this machine."""
        return self.needs_weights

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        """The modules of `packages`."""
        return tuple(package.partition(":")[0] for package in cls.packages)

    @classmethod
    def install_hint(cls, missing: Sequence[str] = ()) -> str:
        """The command that installs the engine's packages, or only those that are `missing`."""
        if cls.pip_extra is None:
            return f"pip install {' '.join(missing or cls.modules())}"
        return pip_install(cls.pip_extra)

    @classmethod
    def kept(cls, stored: Quantization) -> Quantization | None:
        """The format in which this project's layers keep weights that a checkpoint stores as `stored`; None if they
        cannot."""
        return None

    @classmethod
    def reads(cls, quantization: Quantization) -> bool:
        """True if the engine can read a checkpoint in this format."""
        return cls.kept(quantization) is not None

    def most_at_once(self, config: RunConfig) -> int | None:
        """The most prompts answered at a time, on all devices or on each; None for the whole set."""
        if self.continuous_batching:
            return config.load.concurrency
        return config.measure.batch_size

    def check_here(self) -> None:
        """Raise ConfigError for an option that this machine's packages of the engine do not support; called on every
        node."""

    def settle(self, config: RunConfig, on_cuda: bool) -> tuple[RunConfig, list[str]]:
        """The run as this engine can perform it, and a note on each change."""
        return config, []

    def refuse(self, config: RunConfig, model_config: Mapping[str, Any], on_cuda: bool, longest: int) -> None:
        """Raise ConfigError for a run that the engine would compute wrongly; `longest` is the largest number of tokens
        of a prompt and its answer together."""

    def notes(self, config: RunConfig, on_cuda: bool) -> list[str]:
        """Lines that the user should read before the run."""
        return []

    def quantization(self, config: RunConfig, stored: Quantization | None, on_cuda: bool) -> Quantization | None:
        """The format of the run's weights: as they are stored, or quantized while they are loaded."""
        if stored is not None and config.adapter.path is not None and config.adapter.merge:
            fact = f"An adapter is not merged into weights that are quantized already ({stored.name})."
            raise PlanError(fact, "adapter.merge=false")
        if config.quantization is WeightFormat.none:
            return None if stored is None else self.kept(stored)
        return QUANTIZATIONS[config.quantization.name]

    def planner(self, config: RunConfig, model_config: Mapping[str, Any], on_cuda: bool) -> EnginePlanner | None:
        """The engine with these options, for the plan of a run; None if it has no plan."""
        return self.planner_class() if self.planner_class else None


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
    path: str | None = None  # .txt or - (stdin): one prompt per line; .jsonl, .json, .csv, .tsv: rows with fields
    field: str | None = None  # name of the field with the prompt, in a file of rows; None: "prompt", "text", ...
    count: int | None = None  # synthetic: number of prompts
    input_tokens: int | None = None  # synthetic: exact length of each prompt
    output_tokens: int | None = None  # synthetic: exact number of new tokens, EOS ignored
    shared_tokens: int | None = None  # synthetic: length of the common prefix of all prompts, in tokens
    chat: bool = False  # format each text as a user's turn with the model's chat template
    system: str | None = None  # with chat: the system prompt


@dataclass
class SamplingConfig:
    max_new_tokens: int = 32
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    ignore_eos: bool = False


@dataclass
class MeasureConfig:
    scheduling: Scheduling = Scheduling.continuous  # module engines only; other engines have their own scheduler
    batch_size: int = 4  # prompts answered at a time; on each rank for a data-parallel engine
    prefill_tokens: int | None = None  # module engines with slots: prompt tokens per forward, at most; None: 2048
    compile: Compile = Compile.auto  # module engines with slots: how decode steps run
    warmup: int = 1  # batches to run before the measurement
    repeats: int = 3  # number of times to answer the whole prompt set
    find_batch_size: bool = False  # first find the largest batch that fits, by trial
    quality: str | None = None  # text to score after the repeats: builtin, or a file
    profile: int | None = None  # number of decode steps to trace with torch's profiler after all repeats


@dataclass
class RunConfig:
    backend: BackendConfig = MISSING
    model: ModelConfig = MISSING
    prompts: PromptsConfig = MISSING
    precision: Precision = Precision.fp32
    quantization: WeightFormat = WeightFormat.none
    offload: Offload = Offload.none
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    devices: int = 2
    num_nodes: int = 1
    accelerator: Accelerator = Accelerator.auto
    machine: str | None = None  # 2xa6000: dry_run=true plans for two of this device, not for this machine
    link: str | None = None  # link between the devices, for the plan; None: the measured or the usual one
    device: DeviceConfig = field(default_factory=DeviceConfig)
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
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
    def num_shares(self) -> int:
        """The number of parts that the prompt set is split into: one for each device if the engine is data-parallel,
        else 1."""
        if self.backend.data_parallel:
            return self.num_devices
        return 1

    @property
    def join_s(self) -> float:
        """Timeout in seconds for all ranks to connect; shorter than `hang_timeout_s`, so that a missing rank is
        reported before the run counts as hung."""
        return 0.9 * self.hang_timeout_s or 1800.0

    @property
    def world_size(self) -> int:
        """The number of ranks (processes): one for each device, or one that uses all devices of its node."""
        if self.num_nodes > 1 or self.backend.one_process_per_device:
            return self.num_devices
        return 1

    @property
    def is_continuous(self) -> bool:
        """True if the engine is given the whole prompt set in one call."""
        backend = self.backend
        return backend.continuous_batching or (backend.has_slots and self.measure.scheduling is Scheduling.continuous)

    @property
    def splits_prompts(self) -> bool:
        """True if each rank is assigned its own part of the prompts in advance."""
        return self.backend.data_parallel and not self.is_continuous


HOW_IT_IS_RUN = (
    "output_dir", "resume", "run_dir", "hang_timeout_s", "timeout_s", "dry_run", "machine", "link", "device", "cost",
    "launch", "cluster", "experiment",
)  # fmt: skip
"""Keys that do not change what is run: two configurations that differ only in these are the same point."""
