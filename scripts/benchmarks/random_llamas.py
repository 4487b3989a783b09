"""Llamas with random weights, which stand for large models in the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
RANDOM = {
    "random_100mb": {
        **LLAMA, "vocab_size": 6144, "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1376,
        "num_attention_heads": 8, "num_key_value_heads": 8, "eos_token_id": 2,
    },
    "random_1gb": {
        **LLAMA, "vocab_size": 16000, "hidden_size": 1536, "num_hidden_layers": 8, "intermediate_size": 4096,
        "num_attention_heads": 24, "num_key_value_heads": 8, "eos_token_id": 2,
    },
}  # fmt: skip
"""Model configurations, named by their size in fp32."""


def write_random(folder: Path, fields: dict[str, Any], precision: str) -> None:
    """Write a checkpoint of random weights. It is made in another process, so that the caller need not import torch."""
    program = (
        "import json, sys, torch; from safetensors.torch import save_file; from shards.load.meta import build_meta;"
        "from shards.load.random_weights import fill_random; dtype = getattr(torch, sys.argv[3]);"
        "model = build_meta(json.loads(sys.argv[2]), dtype); fill_random(model, 0, 'cpu');"
        "save_file(dict(model.named_parameters()), sys.argv[1] + '/model.safetensors', {'format': 'pt'});"
        "model.config.save_pretrained(sys.argv[1])"
    )
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    command = [sys.executable, "-c", program, str(folder), json.dumps(fields), dtype]
    subprocess.run(command, check=True, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": str(ROOT)})
