"""Prepare speculative decoding: check the model's support, and find a draft model's folder and shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.slots.families import why_no_guesses, why_static
from launcher.config.parts.speculative import DRAFT
from launcher.config.schema import ConfigError
from launcher.models import embedded_folder
from launcher.prepare.shapes import built_of, config_of
from shards.checkpoint.hub import resolve
from shards.model.config_fields import ConfigFields
from shards.model.quantized_checkpoint import from_config

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from shards.model.config_fields import TransformersConfig
    from shards.model.shape import ModelShape


def settle_guesses(config: RunConfig, model_config: TransformersConfig, longest: int) -> RunConfig:
    """The configuration with the folder of the draft model; ConfigError if the model does not work with the draft.

    `longest` is the largest number of tokens of a prompt and its answer together.
    """
    speculative, backend = config.speculative, config.backend
    if not speculative.is_on:
        return config
    remote = config.model.trust_remote_code
    if backend.has_slots and (why := why_static(model_config, remote) or why_no_guesses(model_config)) is not None:
        raise ConfigError(f"speculative={speculative.name}, and {why}.", "speculative=none")
    if speculative.name != DRAFT:
        return config
    folder = _folder(config)
    fields, path = config_of(folder), speculative.model
    ours, theirs = ConfigFields(model_config).size("vocab_size"), ConfigFields(fields).size("vocab_size")
    if ours != theirs:
        fact = f"The draft {path} has a vocabulary of {theirs} tokens, and {config.model.name} one of {ours}."
        raise ConfigError(fact, "speculative=ngram speculative.model=null")
    if backend.has_slots and (why := why_static(fields) or why_no_guesses(fields)) is not None:
        raise ConfigError(f"The draft {path} cannot guess: {why}.", "speculative=ngram speculative.model=null")
    if (stored := from_config(fields)) is not None and backend.has_slots:
        fact = f"The draft {path} is quantized ({stored.name}), and a draft is loaded as plain weights only."
        raise ConfigError(fact, "speculative=ngram speculative.model=null")
    context = ConfigFields(fields).count("max_position_embeddings") or ConfigFields(fields).count("n_positions")
    if context is not None and longest > context:
        fact = f"The draft {path} has {context} positions, and the longest prompt with its answer {longest} tokens."
        raise ConfigError(fact, "speculative=ngram speculative.model=null")
    return replace(config, speculative=replace(speculative, model=str(folder)))


def draft_shape(config: RunConfig) -> ModelShape | None:
    """The shape of the draft model of a run; None without one."""
    if config.speculative.name != DRAFT:
        return None
    return built_of(config_of(_folder(config)), None, config.backend.python).shape


def _folder(config: RunConfig) -> Path:
    path = config.speculative.model or ""
    folder = embedded_folder(path, "speculative.model")
    return folder or resolve(path, None, weights=not config.dry_run).absolute()
