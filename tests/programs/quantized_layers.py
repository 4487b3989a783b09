"""Makes vLLM's linear layers for quantized checkpoints on meta, and prints the bytes of their tensors as one JSON line.

Reads from stdin a list of [quantization_config, [matrices]]; a matrix is [kind, whole outputs, whole inputs, outputs of
each part held here, inputs held here].
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import get_quantization_config

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": 64}
NAMES = {"query_key_value": "self_attn.qkv_proj", "column": "mlp.gate_up_proj", "row": "mlp.down_proj"}


@contextlib.contextmanager
def vllm_at_rest(folder: Path) -> Any:
    """vLLM's configuration and process groups for one process and a bf16 model."""
    (folder / "config.json").write_text(json.dumps(LLAMA))
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16")
    with set_current_vllm_config(VllmConfig(model_config=model)):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1)
        yield


def layer_bytes(fields: dict[str, Any], kind: str, outputs: int, inputs: int, parts: list[int], held: int) -> int:
    """Bytes of the tensors that vLLM's own method for a linear layer creates."""
    config = get_quantization_config(fields["quant_method"]).from_config(fields)
    layer = LinearBase(inputs, outputs, prefix=f"model.layers.0.{NAMES[kind]}")
    method = config.get_quant_method(layer, layer.prefix)
    method.create_weights(
        layer,
        input_size_per_partition=held,
        output_partition_sizes=parts,
        input_size=inputs,
        output_size=outputs,
        params_dtype=torch.bfloat16,
        weight_loader=lambda *_: None,
    )
    return sum(parameter.nbytes for parameter in layer.parameters())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, vllm_at_rest(Path(folder)), torch.device("meta"):
        found = [[layer_bytes(fields, *matrix) for matrix in matrices] for fields, matrices in json.load(sys.stdin)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
