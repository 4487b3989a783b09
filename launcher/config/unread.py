"""Refuse options that a run would ignore: a user who sets one expects an effect."""

from __future__ import annotations

import dataclasses
import os
import socket
from typing import TYPE_CHECKING, Any

from launcher.config.engines import example_with
from launcher.config.parts.formats import Weights
from launcher.config.parts.launching import ClusterConfig, LaunchConfig
from launcher.config.parts.serving import ServerConfig
from launcher.config.parts.storage import Offload
from launcher.config.schema import ConfigError, SamplingConfig

if TYPE_CHECKING:
    from collections.abc import Collection

    from launcher.config.schema import RunConfig

ONLY_SLURM = ("wait", "poll_s")
ONLY_LOCAL = ("rendezvous", "node_rank")
WITH_ADAPTERS = 'prompts=file prompts.path= a .jsonl with {"prompt": "...", "adapter": "NAME"} a line'


def check_read(config: RunConfig, given: Collection[str]) -> None:
    """ConfigError for a value that has no effect together with the others; `given` are the keys of the command line."""
    if config.machine is not None and not config.dry_run and config.backend.uses_devices:
        raise ConfigError(f"machine={config.machine} is only used with dry_run=true.", "dry_run=true")
    _check_launch(config)
    _check_sampling(config, given)
    _check_adapter(config)
    steps, most_steps = config.measure.profile, (config.prompts.output_tokens or config.sampling.max_new_tokens) - 1
    if steps is not None and not config.backend.can_trace:
        fact = f"measure.profile={steps}, and backend={config.backend.name} runs no torch module to trace."
        raise ConfigError(fact, f"measure.profile=null, or {example_with('can_trace')}")
    if steps is not None and steps > most_steps:
        fact = f"measure.profile={steps}, and there are {most_steps} decode steps in an answer."
        raise ConfigError(fact, f"sampling.max_new_tokens={steps + 1}")
    if config.measure.quality is not None and not config.backend.can_score:
        fact = f"measure.quality={config.measure.quality}, and backend={config.backend.name} cannot score a text."
        raise ConfigError(fact, f"measure.quality=null, or {example_with('can_score')}")
    _check_model(config, given)
    if config.backend.continuous_batching and "measure.batch_size" in given:
        hint = "leave measure.batch_size out"
        if config.backend.most_at_once_key:
            hint = f"{config.backend.most_at_once_key}={config.measure.batch_size}"
        raise ConfigError(unread_batch_size(config), hint)
    if config.server.name == "none" and (name := changed(config.server, ServerConfig())) is not None:
        raise ConfigError(
            f"server.{name} is only used with a server, and server=none starts none.",
            f"{example_with('starts_servers')} server=vllm",
        )


def _check_launch(config: RunConfig) -> None:
    if config.launch.name == "local":
        if (name := changed(config.cluster, ClusterConfig())) is not None:
            key = f"cluster.{name}".removesuffix(".name")
            raise ConfigError(f"{key}={getattr(config.cluster, name)} is only used with launch=slurm.", "launch=slurm")
        if (name := changed(config.launch, LaunchConfig(), ONLY_SLURM)) is not None:
            value = str(getattr(config.launch, name)).lower()
            raise ConfigError(f"launch.{name}={value} is only used with launch=slurm.", "launch=slurm")
        if config.launch.node_rank is not None and config.launch.rendezvous is None:
            fact = f"launch.node_rank={config.launch.node_rank} is only used with launch.rendezvous=."
            raise ConfigError(fact, f"launch.rendezvous={socket.gethostname()}:29400")
    elif config.launch.name == "slurm" and (name := changed(config.launch, LaunchConfig(), ONLY_LOCAL)) is not None:
        fact = f"launch.{name}={getattr(config.launch, name)} is only used with launch=local: SLURM joins the nodes."
        raise ConfigError(fact, f"launch.{name}=null")


def _check_sampling(config: RunConfig, given: Collection[str]) -> None:
    sampling, new_tokens = config.sampling, config.prompts.output_tokens
    if sampling.temperature == 0 and (name := changed(sampling, SamplingConfig(), ("top_p", "top_k"))) is not None:
        value = getattr(sampling, name)
        raise ConfigError(f"sampling.{name}={value} is not used at sampling.temperature=0.", "sampling.temperature=1")
    if new_tokens is None:
        return
    fact = f"is not used with prompts.output_tokens={new_tokens}, which fixes the number of new tokens."
    if "sampling.max_new_tokens" in given and sampling.max_new_tokens != new_tokens:
        asked = sampling.max_new_tokens
        raise ConfigError(f"sampling.max_new_tokens={asked} {fact}", f"prompts.output_tokens={asked}")
    if "sampling.ignore_eos" in given and not sampling.ignore_eos:
        raise ConfigError(f"sampling.ignore_eos=false {fact}", "prompts.output_tokens=null")


def _check_adapter(config: RunConfig) -> None:
    path, is_merged = config.adapter.path, config.adapter.merge
    if config.adapter.paths:
        _check_named_adapters(config)
        return
    if path is None:
        if not is_merged:
            raise ConfigError("adapter.merge=false, and there is no adapter.", "leave adapter.merge out")
        return
    if not is_merged and not config.backend.takes_adapters:
        fact = f"adapter.merge=false, and backend={config.backend.name} does not support unmerged adapters."
        if config.backend.merges_adapters:
            raise ConfigError(fact, "adapter.merge=true")
        raise ConfigError(fact, example_with("takes_adapters"))
    if not is_merged and config.offload is not Offload.none:
        fact = f"adapter.merge=false, and offload={config.offload.name} supports merged weights only."
        raise ConfigError(fact, "adapter.merge=true")
    if is_merged and not config.backend.merges_adapters:
        fact = f"adapter.path={path}, and backend={config.backend.name} does not merge adapters."
        beside = "adapter.merge=false" if config.backend.takes_adapters else "adapter.path=null"
        raise ConfigError(fact, f"{beside}, or {example_with('merges_adapters')}")
    if config.model.weights is Weights.random:
        fact = f"adapter.path={path} needs trained weights, and model.weights=random are not."
        raise ConfigError(fact, "adapter.path=null")


def _check_named_adapters(config: RunConfig) -> None:
    """ConfigError for `adapter.paths` in a run that cannot use it: named adapters stay unmerged, and each prompt names
    its own."""
    names, backend = ", ".join(config.adapter.paths), config.backend
    if not backend.names_adapters:
        fact = f"adapter.paths has {names}, and backend={backend.name} supports one adapter for all prompts."
        raise ConfigError(fact, f"{example_with('names_adapters')}, or adapter.path= the folder of one")
    if config.adapter.path is not None or not config.adapter.merge:
        fact = f"adapter.paths has {names}, beside which adapter.path and adapter.merge are not read."
        raise ConfigError(fact, "adapter.path=null adapter.merge=true")
    if config.prompts.path is None:
        fact = f"adapter.paths has {names}, and prompts={config.prompts.name} assigns no adapter to a prompt."
        raise ConfigError(fact, WITH_ADAPTERS)
    if config.measure.quality is not None:
        fact = f"measure.quality={config.measure.quality} scores one model, and adapter.paths has {names}."
        raise ConfigError(fact, "measure.quality=null, or adapter.path= one of them with adapter.merge=false")
    if config.offload is not Offload.none:
        fact = f"adapter.paths has {names}, and offload={config.offload.name} supports merged weights only."
        raise ConfigError(fact, "offload=none")
    if config.model.weights is Weights.random:
        fact = f"adapter.paths has {names}, which need trained weights, and model.weights=random are not."
        raise ConfigError(fact, "model.weights=auto")


def _check_model(config: RunConfig, given: Collection[str]) -> None:
    """ConfigError for `model.revision` or `model.config.*` with a model that does not use them: a local folder has no
    revisions, and weights come with their own config.json."""
    model = config.model
    is_here = model.path.startswith("embedded:") or os.path.isdir(model.path)
    if model.revision is not None and is_here:
        fact = (
            f"model.revision={model.revision} is a revision on the hub, but model.path={model.path} is on this machine."
        )
        raise ConfigError(fact, "model.revision=null")
    is_made = model.config is not None and model.weights is Weights.random
    if model.revision is not None and is_made:
        fact = (
            f"model.revision={model.revision} is not used with model.weights=random: model={model.name} has a config."
        )
        raise ConfigError(fact, "model.revision=null")
    key = next((key for key in sorted(given) if f"{key}.".startswith("model.config.")), None)
    if key is not None and is_here:
        fact = f"{key} is not used with model.path={model.path}, which has a config.json of its own."
        raise ConfigError(fact, f"leave {key} out, or change that file")
    if key is not None and not is_made and not config.dry_run:
        fact = f"{key} is not used with the weights of {model.path}, which come with a config.json of their own."
        raise ConfigError(fact, "model.weights=random")


def unread_batch_size(config: RunConfig) -> str:
    """The sentence that says that the engine does not use `measure.batch_size`."""
    size, name = config.measure.batch_size, config.backend.name
    return f"measure.batch_size={size} is not used: backend={name} makes its batches itself."


def changed(config: Any, defaults: Any, names: Collection[str] | None = None) -> str | None:
    """The first field, of those in `names` or of all, that differs from its default."""
    fields = (field.name for field in dataclasses.fields(config))
    return next(
        (n for n in fields if (names is None or n in names) and getattr(config, n) != getattr(defaults, n)), None
    )
