"""Options that a run would not read: each is refused, for whoever sets one means something by it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from launcher.config.schema import ClusterConfig, ConfigError, LaunchConfig, SamplingConfig

if TYPE_CHECKING:
    from collections.abc import Collection

    from launcher.config.schema import RunConfig

ONLY_SLURM = ("wait", "poll_s")
ONLY_LOCAL = ("rendezvous", "node_rank")


def check_read(config: RunConfig, given: Collection[str]) -> None:
    """ConfigError for a value that nothing reads beside the others; `given` are the keys of the command line."""
    if config.machine is not None and not config.dry_run and config.backend.uses_devices:
        raise ConfigError(f"machine={config.machine} is read with dry_run=true only.", "dry_run=true")
    _check_launch(config)
    _check_sampling(config, given)
    _check_profile(config)
    if config.measure.quality is not None and not config.backend.can_score:
        fact = f"measure.quality={config.measure.quality}, and backend={config.backend.name} foretells no text."
        raise ConfigError(fact, "measure.quality=null, or backend=fsdp")


def _check_launch(config: RunConfig) -> None:
    if config.launch.name == "local":
        if (name := changed(config.cluster, ClusterConfig())) is not None:
            key = "cluster" if name == "name" else f"cluster.{name}"
            raise ConfigError(f"{key}={getattr(config.cluster, name)} is read with launch=slurm only.", "launch=slurm")
        if (name := changed(config.launch, LaunchConfig(), ONLY_SLURM)) is not None:
            value = str(getattr(config.launch, name)).lower()
            raise ConfigError(f"launch.{name}={value} is read with launch=slurm only.", "launch=slurm")
        if config.launch.node_rank is not None and config.launch.rendezvous is None:
            fact = f"launch.node_rank={config.launch.node_rank} is read with launch.rendezvous= only."
            raise ConfigError(fact, "launch.rendezvous=FIRST_HOST:29400")
    elif config.launch.name == "slurm" and (name := changed(config.launch, LaunchConfig(), ONLY_LOCAL)) is not None:
        fact = f"launch.{name}={getattr(config.launch, name)} is read with launch=local only: SLURM joins the nodes."
        raise ConfigError(fact, f"launch.{name}=null")


def _check_sampling(config: RunConfig, given: Collection[str]) -> None:
    sampling, new_tokens = config.sampling, config.prompts.output_tokens
    if sampling.temperature == 0 and (name := changed(sampling, SamplingConfig(), ("top_p", "top_k"))) is not None:
        value = getattr(sampling, name)
        raise ConfigError(f"sampling.{name}={value} is not read at sampling.temperature=0.", "sampling.temperature=1")
    if new_tokens is None:
        return
    fact = f"is not read with prompts.output_tokens={new_tokens}, which fixes the number of new tokens."
    if "sampling.max_new_tokens" in given and sampling.max_new_tokens != new_tokens:
        asked = sampling.max_new_tokens
        raise ConfigError(f"sampling.max_new_tokens={asked} {fact}", f"prompts.output_tokens={asked}")
    if "sampling.ignore_eos" in given and not sampling.ignore_eos:
        raise ConfigError(f"sampling.ignore_eos=false {fact}", "prompts.output_tokens=null")


def _check_profile(config: RunConfig) -> None:
    steps = config.measure.profile
    if steps is None:
        return
    if not config.backend.can_trace:
        fact = f"measure.profile={steps}, and backend={config.backend.name} is no torch module that a rank could trace."
        raise ConfigError(fact, "measure.profile=null, or backend=fsdp")
    most = (config.prompts.output_tokens or config.sampling.max_new_tokens) - 1
    if steps > most:
        fact = f"measure.profile={steps}, and there are {most} decode steps in an answer."
        raise ConfigError(fact, f"sampling.max_new_tokens={steps + 1}")


def changed(config: Any, defaults: Any, names: Collection[str] | None = None) -> str | None:
    """The first field, of those named or all, that is not as it is by default."""
    fields = (field.name for field in dataclasses.fields(config))
    return next(
        (n for n in fields if (names is None or n in names) and getattr(config, n) != getattr(defaults, n)), None
    )
