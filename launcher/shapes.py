"""The shape of a run's model: at once where its family is known, else as transformers builds it in another process."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shards.any_model import Built, ask_transformers, shape_from_tensors
from shards.errors import PlanError
from shards.model import KNOWN_FAMILIES, ModelShape
from shards.quantized_checkpoint import from_config, unpacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shards.tensor_files import TensorEntry


def built_of(
    model_config: Mapping[str, Any], tensors: Mapping[str, TensorEntry] | None = None, python: str | None = None
) -> Built:
    """Exact from the config alone; from its files' headers where transformers cannot say (a model with its own code).

    Families that are not known take seconds, once, and a line on stderr says so; the transformers of `python` is asked,
    else that of this interpreter. PlanError where neither way leads to a shape.
    """
    if model_config.get("model_type") in KNOWN_FAMILIES:
        return Built(ModelShape.from_config(model_config))
    try:
        return _asked(json.dumps(model_config, sort_keys=True), python or sys.executable)
    except PlanError as error:
        if tensors is None:
            raise
        shapes = {name: entry.shape for name, entry in tensors.items()}
        quantization = from_config(model_config)
        shape = shape_from_tensors(model_config, unpacked(shapes, quantization) if quantization else shapes)
        return Built(shape, (f"its shapes are those of its files: {error.fact.rstrip('.')}",))


@lru_cache(maxsize=16)
def _asked(config: str, python: str) -> Built:
    fields = json.loads(config)
    print(f"model_type {fields.get('model_type')}: asking transformers for its shapes, which takes seconds",
          file=sys.stderr, flush=True)  # fmt: skip
    return ask_transformers(fields, python)
