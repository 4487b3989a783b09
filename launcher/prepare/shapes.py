"""Find the shape of a run's model: built in for known families, otherwise from transformers in another process."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

from shards.errors import CheckpointError, PlanError
from shards.model.any_shape import Built, ask_transformers, shape_from_tensors
from shards.model.config_fields import check_config
from shards.model.known_shape import KNOWN_FAMILIES, known_shape
from shards.model.quantized_checkpoint import from_config, unpacked
from shards.model.shape import ModelShape
from shards.untrusted_files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from shards.checkpoint.tensor_files import TensorEntry
    from shards.model.config_fields import TransformersConfig
    from shards.untrusted_files import JsonObject


def config_of(folder: Path) -> JsonObject:
    """The transformers config of the model in a folder; CheckpointError if it is missing or cannot be read."""
    path = folder / "config.json"
    try:
        config = read_json(path, CheckpointError, "download the model again")
    except FileNotFoundError:
        hint = "model.path= a folder that save_pretrained wrote, or model.path=embedded:tiny_falcon"
        if below := sorted(folder.glob("*/config.json")):
            hint = f"model.path={below[0].parent}"
        raise CheckpointError(f"{folder} has no config.json.", hint) from None
    if not isinstance(config, dict) or "vocab_size" not in config:
        raise CheckpointError(
            f"{path} has no vocab_size.",
            "model.path=embedded:tiny_falcon, or another causal language model of transformers",
        )
    check_config(config)
    return config


def built_of(
    model_config: TransformersConfig, tensors: Mapping[str, TensorEntry] | None = None, python: str | None = None
) -> Built:
    """The shape of a model from its config; from the headers of its files if transformers cannot build the model (one
    with its own code).

    For unknown families transformers is asked, in `python` or this interpreter; that takes seconds, once, and prints a
    line on stderr. PlanError if neither way gives a shape.
    """
    if model_config.get("model_type") in KNOWN_FAMILIES:
        return Built(known_shape(model_config))
    shapes = _asked(json.dumps(model_config, sort_keys=True), python or sys.executable)
    if isinstance(shapes, Built):
        return shapes
    if tensors is None:
        raise shapes
    note = f"its shapes are those of its files: {shapes.fact.rstrip('.')}"
    return Built(shape_of_files(model_config, tensors), (note,))


def shape_of_files(model_config: TransformersConfig, tensors: Mapping[str, TensorEntry]) -> ModelShape:
    """The shape of a model from its checkpoint's headers, with the unpacked shapes of quantized matrices."""
    shapes = {name: entry.shape for name, entry in tensors.items()}
    quantization = from_config(model_config)
    sizes = {name: size for name, size in model_config.items() if name != "windows"}  # not part of a model's config
    if quantization:
        shapes = unpacked(shapes, quantization)
    return shape_from_tensors(sizes, shapes)


@lru_cache(maxsize=16)
def _asked(config: str, python: str) -> Built | PlanError:
    """The shapes that transformers gives for a config, or its error; cached."""
    fields = json.loads(config)
    line = f"model_type {fields.get('model_type')}: asking transformers for its shapes, which takes seconds"
    print(line, file=sys.stderr, flush=True)
    try:
        return ask_transformers(fields, python)
    except PlanError as error:
        return error
