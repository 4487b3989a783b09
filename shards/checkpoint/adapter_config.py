"""The folder of a LoRA adapter saved by peft: its config, checked for what is supported, and its shapes. No torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shards.checkpoint.tensor_files import read_safetensors
from shards.errors import CheckpointError
from shards.untrusted_files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from shards.untrusted_files import JsonObject

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOT_MERGED = {
    "use_dora": "DoRA", "modules_to_save": "modules_to_save", "fan_in_fan_out": "fan_in_fan_out",
    "alpha_pattern": "alpha_pattern", "trainable_token_indices": "trainable_token_indices", "lora_bias": "lora_bias",
    "target_parameters": "target_parameters",
}  # fmt: skip
"""Settings of peft that do more than add two factors to each matrix, and their names in error messages."""


FACTOR = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight$")


def factor_shapes(folder: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    """The shapes of the factors A [r, inputs] and B [outputs, r], by (name of the module, "A" or "B")."""
    entries = {FACTOR.match(entry.name): entry.shape for entry in read_safetensors(folder / WEIGHTS)}
    return {(match[1], match[2]): shape for match, shape in entries.items() if match is not None}


def read_config(folder: Path) -> JsonObject:
    """The adapter_config.json of a folder; CheckpointError if there is no adapter, or one that is not supported."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {' and no '.join(missing)}.", "a folder that peft has saved")
    config = read_json(folder / CONFIG, CheckpointError, "save the adapter again")
    if not isinstance(config, dict):
        config = {}
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{folder} is an adapter of type {kind}, not LORA.", "an adapter of type LORA")
    others = [name for key, name in NOT_MERGED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        others.append(f"bias={config['bias']}")
    if others:
        raise CheckpointError(
            f"{folder} has {', '.join(others)}, which is not merged here.",
            "merge it with peft and run that",
        )
    alpha = config.get("lora_alpha")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise CheckpointError(f"{folder / CONFIG} has lora_alpha={alpha!r}, not a number.", "save the adapter again")
    loaded: JsonObject = config
    return loaded
