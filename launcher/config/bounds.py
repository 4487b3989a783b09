"""Limits of the configuration: bounds of every number, and options that exclude each other."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from typing import TYPE_CHECKING, Any, get_args

from launcher.config.engines import example_with
from launcher.config.keys import example_of, key_types
from launcher.config.machine import machine_of
from launcher.config.options import (
    ANY,
    BOUND,
    CHOICES,
    COUNT,
    MOST_PROMPTS,
    MOST_TIMES,
    MOST_TOKENS,
    NOT_NEGATIVE,
    POSITIVE_SECONDS,
    SECONDS,
    SHARE,
    TOKENS,
    Bounds,
)
from launcher.config.parts.compiling import Compile
from launcher.config.parts.experiment import FIGURES, ExperimentConfig
from launcher.config.parts.speculative import KEYS
from launcher.config.schema import ConfigError, RunConfig, Scheduling
from shards.plan.request import MOST_DEVICES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.config.schema import BackendConfig, PromptsConfig


BOUNDS: dict[str, Bounds] = {
    "devices": Bounds(1, MOST_DEVICES),
    "num_nodes": Bounds(1, MOST_DEVICES),
    "seed": Bounds(0, 2**32 - 1),  # torch's 64-bit seed is (seed << 32) + prompt index; numpy's limit is also 32 bits
    "hang_timeout_s": SECONDS,
    "timeout_s": SECONDS,
    "prompts.count": Bounds(1, MOST_PROMPTS),
    "prompts.input_tokens": TOKENS,
    "prompts.output_tokens": TOKENS,
    "prompts.shared_tokens": TOKENS,
    "sampling.max_new_tokens": TOKENS,
    "sampling.temperature": NOT_NEGATIVE,
    "sampling.top_p": SHARE,
    "sampling.top_k": NOT_NEGATIVE,
    "measure.batch_size": COUNT,
    "measure.prefill_tokens": TOKENS,
    "measure.warmup": Bounds(0, MOST_TIMES),
    "measure.profile": Bounds(1, 1000),
    "cost.device_hour": NOT_NEGATIVE,
    "measure.repeats": Bounds(1, MOST_TIMES),
    "load.concurrency": COUNT,
    "load.request_rate": Bounds(0, MOST_TIMES, is_open=True),
    "slo.ttft": POSITIVE_SECONDS,
    "slo.tpot": POSITIVE_SECONDS,
    "slo.e2el": POSITIVE_SECONDS,
    "server.ready_timeout_s": POSITIVE_SECONDS,
    "speculative.tokens": Bounds(1, 64),
    "speculative.ngram_max": Bounds(1, 64),
    "speculative.ngram_min": Bounds(1, 64),
    "launch.poll_s": POSITIVE_SECONDS,
    "launch.node_rank": NOT_NEGATIVE,
    "cluster.cpus_per_task": COUNT,
    "cluster.signal_s": Bounds(0, 65535),  # sbatch's limit
    "cluster.max_requeues": NOT_NEGATIVE,
    "cluster.array_limit": COUNT,
}
"""The bounds of each number, by its key; those of an engine's options are declared with the options. A value of None is
not checked."""


def check(config: RunConfig) -> None:
    """Raise ConfigError for a value that is never valid."""
    backend, measure, load = config.backend, config.measure, config.load
    keys = key_types(RunConfig) | key_types(type(config.backend), "backend.")
    for key, hint in keys.items():
        if get_args(hint)[-1:] != (str,) or key == "prompts.texts":  # prompts are checked when they are read
            continue
        items = operator.attrgetter(key)(config) or []
        if isinstance(items, dict):
            items = items.values()
        if stray := [item for item in items if not isinstance(item, str)]:
            raise ConfigError(f"{key} has {str(stray[0])[:80]}, which is not a text.", f"{key}={example_of(hint)}")
    _check_experiment(config.experiment)
    bounds = BOUNDS | _check_backend(backend)
    for key, value in numbers(config):
        limits = bounds.get(key, ANY)
        if not limits.has(value):
            raise ConfigError(
                f"{key}={value} is not a number {limits.beside(value)}.", f"{key}={limits.nearest(value)}"
            )
    if (size := config.devices * config.num_nodes) > MOST_DEVICES:
        hint = f"devices={MOST_DEVICES // config.num_nodes}"
        raise ConfigError(f"devices x num_nodes is {size}, more than {MOST_DEVICES}.", hint)
    if measure.find_batch_size and backend.continuous_batching:
        fact = f"{backend.name} forms its own batches: there is no batch size to find."
        raise ConfigError(fact, "measure.find_batch_size=false")
    if measure.find_batch_size and config.launch.name != "local":
        raise ConfigError("measure.find_batch_size needs launch=local: each try waits for the last.", "launch=local")
    if backend.continuous_batching and measure.scheduling is Scheduling.static:
        fact = f"{backend.name} has its own scheduler, which is continuous."
        raise ConfigError(fact, "measure.scheduling=continuous")
    reads = backend.has_slots and config.is_continuous
    reader = f"backend={backend.name}"
    if backend.has_slots:
        reader = "measure.scheduling=static"
    if measure.compile is not Compile.auto and not reads:
        raise ConfigError(f"measure.compile={measure.compile.name}: {reader} does not use it.", "measure.compile=auto")
    if measure.compile in (Compile.inductor, Compile.cudagraph) and config.speculative.is_on:
        fact = f"measure.compile={measure.compile.name}: steps of speculative decoding cannot be compiled."
        raise ConfigError(fact, "measure.compile=auto, or speculative=none")
    if measure.prefill_tokens is not None and not reads:
        fact = f"measure.prefill_tokens={measure.prefill_tokens}: {reader} does not use it."
        raise ConfigError(fact, "measure.prefill_tokens=null")
    ways = {"concurrency": load.concurrency, "request_rate": load.request_rate, "arrivals": load.arrivals or None}
    given = [f"load.{name}" for name, value in ways.items() if value is not None]
    if given and not backend.takes_load:
        raise ConfigError(f"backend={backend.name} is given batches, and does not use {given[0]}.", f"{given[0]}=null")
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} are different arrival modes.", f"{given[1]}=null")
    if config.server.name != "none" and not backend.starts_servers:
        raise ConfigError(
            f"backend={backend.name} calls no server, but server={config.server.name} starts one.", "server=none"
        )
    _check_speculative(config)
    _check_prompts(config.prompts)


def _check_experiment(experiment: ExperimentConfig) -> None:
    """ConfigError for an invalid published figure, or for unknown hardware."""
    if experiment.hardware is not None:
        machine_of(experiment.hardware, "experiment.hardware")
    for figure in experiment.figures:
        if figure.name not in FIGURES:
            near = difflib.get_close_matches(figure.name, FIGURES, 1, cutoff=0)[0]
            fact = f"experiment.figures has {figure.name[:80]}, which is not one of {', '.join(FIGURES)}."
            raise ConfigError(fact, f"name: {near}")
        if not (math.isfinite(figure.value) and figure.value > 0):
            raise ConfigError(f"experiment.figures has {figure.name}={figure.value}.", "a value above 0")


def _check_speculative(config: RunConfig) -> None:
    """ConfigError for an unknown kind of speculative decoding, for keys of another kind, or without support by the
    engine."""
    speculative, name = config.speculative, config.backend.name
    if speculative.name not in KEYS:
        fact = f"speculative.name={speculative.name} is not one of {', '.join(KEYS)}."
        raise ConfigError(fact, f"speculative={difflib.get_close_matches(speculative.name, KEYS, 1, cutoff=0)[0]}")
    unread = [
        key
        for key in vars(speculative)
        if key not in ("name", *KEYS[speculative.name]) and getattr(speculative, key) is not None
    ]
    if unread:
        key = unread[0]
        reader = next(kind for kind, keys in KEYS.items() if key in keys)
        fact = f"speculative.{key}={getattr(speculative, key)} is not used with speculative={speculative.name}."
        raise ConfigError(fact, f"speculative={reader}, or speculative.{key}=null")
    if speculative.is_on and not config.backend.speculates:
        fact = f"speculative={speculative.name}, and backend={name} does not support it."
        raise ConfigError(fact, f"speculative=none, or {example_with('speculates')}")
    if speculative.is_on and not config.is_continuous:
        kind = speculative.name
        fact = f"speculative={kind}: rows gain different numbers of tokens, which a static batch does not support."
        raise ConfigError(fact, "measure.scheduling=continuous")
    missing = [key for key in KEYS[speculative.name] if getattr(speculative, key) is None]
    if missing:
        key = f"speculative.{missing[0]}"
        example = {"speculative.model": "embedded:tiny_draft"}.get(key, "1")
        raise ConfigError(f"{key} has no value, and speculative={speculative.name} reads it.", f"{key}={example}")
    if (
        speculative.ngram_max is not None
        and speculative.ngram_min is not None
        and speculative.ngram_min > speculative.ngram_max
    ):
        fact = f"speculative.ngram_min={speculative.ngram_min} is above speculative.ngram_max={speculative.ngram_max}."
        raise ConfigError(fact, f"speculative.ngram_min={speculative.ngram_max}")
    if speculative.is_on and (steps := config.measure.profile) is not None:
        fact = (
            f"measure.profile={steps} are steps of a token a row, and with speculative={speculative.name} they are not."
        )
        raise ConfigError(fact, "measure.profile=null, or speculative=none")


def _check_backend(backend: BackendConfig) -> dict[str, Bounds]:
    """The bounds of the engine's own numbers; ConfigError for an option whose value is not one of its choices."""
    bounds = {}
    for item in dataclasses.fields(backend):
        key, choices = f"backend.{item.name}", item.metadata.get(CHOICES)
        if BOUND in item.metadata:
            bounds[key] = item.metadata[BOUND]
        if choices and (value := getattr(backend, item.name)) not in choices:
            known = [choice for choice in choices if choice]
            raise ConfigError(f"{key}={value} is not one of {', '.join(known)}.", f"{key}={known[0]}")
    return bounds


def _check_prompts(prompts: PromptsConfig) -> None:
    """ConfigError for options of several sources: prompts come from texts, a file or random ids, and options of another
    source would be ignored."""
    path, length, count = prompts.path, prompts.input_tokens, prompts.count
    if path is not None and (prompts.texts is not None or length is not None):
        fact = f"prompts={prompts.name} has its own prompts, and does not use prompts.path={path}."
        raise ConfigError(fact, f"prompts=file prompts.path={path}")
    if path is None and prompts.field is not None:
        fact = f"prompts={prompts.name} has no file, and does not use prompts.field={prompts.field}."
        raise ConfigError(fact, f"prompts=file prompts.path=questions.csv prompts.field={prompts.field}")
    if length is not None and (prompts.texts is not None or count is None):
        fact = f"prompts.input_tokens={length} is the length of random prompts, and prompts={prompts.name} has others."
        raise ConfigError(fact, f"prompts=synthetic prompts.input_tokens={length}")
    if count is not None and length is None:
        fact = f"prompts.count={count} is the number of random prompts, and prompts={prompts.name} has others."
        raise ConfigError(fact, f"prompts=synthetic prompts.count={count}")
    if count is not None and length is not None and count * length > MOST_TOKENS:
        fact = f"prompts.count={count} of prompts.input_tokens={length} are {count * length:,} tokens, more than "
        raise ConfigError(f"{fact}{MOST_TOKENS:,}.", f"prompts.count={max(MOST_TOKENS // length, 1)}")

    shared = prompts.shared_tokens
    if shared is not None and length is None:
        fact = f"prompts.shared_tokens={shared} is of random prompts, and prompts={prompts.name} has others."
        raise ConfigError(fact, f"prompts=synthetic prompts.shared_tokens={shared}")
    if shared is not None and length is not None and shared > length:
        fact = f"prompts.shared_tokens={shared}, and a prompt has prompts.input_tokens={length}."
        raise ConfigError(fact, f"prompts.shared_tokens={length}")
    if prompts.chat and length is not None:
        fact = f"prompts.chat=true, and the prompts of prompts={prompts.name} are random tokens, not texts."
        raise ConfigError(fact, "prompts.chat=false")
    if prompts.system is not None and not prompts.chat:
        raise ConfigError("prompts.system= is only used with prompts.chat=true.", "prompts.chat=true")


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a configuration by their keys, without those in free-form dicts of an engine or a model."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{item.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + item.name, value
