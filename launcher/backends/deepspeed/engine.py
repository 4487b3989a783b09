"""The options of DeepSpeed-Inference, and its limits, which are checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from launcher.backends.deepspeed.requirements import slow_all_reduce
from launcher.config.options import COUNT, number
from launcher.config.parts.compiling import Compile
from launcher.config.parts.storage import Offload, Precision
from launcher.config.schema import BackendConfig, ConfigError
from shards.engines.deepspeed import DeepSpeedPlanner
from shards.engines.zero import ZeroPlanner
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from shards.model.config_fields import TransformersConfig

KERNEL_FAMILIES = ("bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "internlm", "llama", "opt")
"""Decoder families that DeepSpeed has kernels for. Source: module_inject/replace_policy.py."""

UNCUTTABLE = {
    "gpt2": "DeepSpeed's own list excludes it",
    "xlnet": "DeepSpeed's own list excludes it",
    "xlm": "DeepSpeed's own list excludes it",
    "codegen": "it interleaves the blocks of its fused projection",
    "glm": "it cuts its fused projections in several blocks",
    "gpt_bigcode": "it gives every rank all keys and values",
    "mpt": "it cuts its fused projection in several blocks",
    "olmo2": "it cuts the heads and not the norm over all of them",
    "phi3": "it cuts its fused projections in several blocks",
}
"""Families that AutoTP does not cut, or does not cut into one block per rank, which our loader requires."""

PLAIN = "backend.kernel_inject=false, which is tensor parallel with transformers' own layers"


@dataclass
class DeepSpeedConfig(BackendConfig):
    """AutoTP cuts every layer over the ranks, which answer each prompt together; with `zero`, ZeRO-Inference shards
    every parameter, and each rank answers its own prompts."""

    implementation: ClassVar[str] = "launcher.backends.deepspeed.backend:DeepSpeedBackend"
    planner_class: ClassVar[type[EnginePlanner] | None] = DeepSpeedPlanner
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers:AutoModelForCausalLM", "deepspeed:init_inference")
    pip_extra: ClassVar[str | None] = "deepspeed"
    has_slots: ClassVar[bool] = True
    can_score: ClassVar[bool] = True
    speculates: ClassVar[bool] = True
    can_trace: ClassVar[bool] = True
    loads_by_name: ClassVar[bool] = True
    merges_adapters: ClassVar[bool] = True

    name: str = "deepspeed"
    zero: bool = False  # ZeRO-Inference instead of AutoTP; offload= turns it on
    kernel_inject: bool = False  # DeepSpeed's own kernels; refused, with the reason why they do not work
    max_out_tokens: int | None = number(None, COUNT)  # tokens of a prompt and its answer; None: the model's positions

    @property
    def data_parallel(self) -> bool:  # type: ignore[override]
        """True with ZeRO: its ranks gather parameters, and each can compute on its own prompts."""
        return self.zero

    def settle(self, config: RunConfig, on_cuda: bool) -> tuple[RunConfig, list[str]]:
        """Turn ZeRO on if weights are offloaded."""
        if config.offload is Offload.none or self.zero:
            return config, []
        note = f"offload={config.offload.name}: ZeRO-Inference (backend.zero=true), each rank has prompts of its own"
        return replace(config, backend=replace(self, zero=True)), [note]

    def planner(self, config: RunConfig, model_config: TransformersConfig, on_cuda: bool) -> EnginePlanner | None:
        if self.zero:
            return ZeroPlanner()
        return DeepSpeedPlanner()

    def refuse(self, config: RunConfig, model_config: TransformersConfig, on_cuda: bool, longest: int) -> None:
        """Refuse combinations, most of which DeepSpeed would silently compute wrongly."""
        family = str(model_config.get("model_type"))
        if config.precision is Precision.fp16 and not on_cuda:
            raise ConfigError("DeepSpeed has no fp16 on a CPU.", "precision=bf16")
        if self.kernel_inject:
            raise ConfigError(f"backend.kernel_inject=true: {_without_kernels(family, on_cuda)}.", PLAIN)
        if self.zero and self.max_out_tokens is not None:
            fact = (
                f"backend.max_out_tokens={self.max_out_tokens} is an option of init_inference, not of ZeRO-Inference."
            )
            raise ConfigError(fact, "backend.max_out_tokens=null")
        if self.zero and config.measure.compile is Compile.inductor:
            fact = "measure.compile=inductor: ZeRO gathers parameters in hooks, which are not compiled."
            raise ConfigError(fact, "measure.compile=none, or backend=fsdp")
        if config.num_devices > 1 and not self.zero:
            elsewhere = "backend=fsdp, or devices=1"
            if reason := UNCUTTABLE.get(family):
                raise ConfigError(f"DeepSpeed's AutoTP cannot be used for {family}: {reason}.", elsewhere)
            if family == "falcon" and model_config.get("alibi"):
                raise ConfigError(
                    "DeepSpeed's AutoTP splits the heads of a Falcon but not its ALiBi slopes, one for each head.",
                    elsewhere,
                )
        if self.max_out_tokens is not None and self.max_out_tokens < longest:
            raise ConfigError(
                f"backend.max_out_tokens={self.max_out_tokens}, and the longest prompt with its answer has {longest}.",
                f"backend.max_out_tokens={longest}, or null for as long as needed",
            )

    def notes(self, config: RunConfig, on_cuda: bool) -> list[str]:
        if self.zero:
            return []
        return slow_all_reduce(config, on_cuda)


def _without_kernels(family: str, on_cuda: bool) -> str:
    """The reason why kernel injection does not work: the family, the device, or the version of transformers."""
    if family not in KERNEL_FAMILIES:
        return f"DeepSpeed has no kernels for {family}; it would silently replace and shard nothing"
    if not on_cuda:
        return f"DeepSpeed's kernels for {family} run on CUDA only"
    return (
        f"DeepSpeed's layers for {family} keep keys and values to themselves and return tuples, where transformers 5 "
        "looks for them in its own cache and takes tensors"
    )
