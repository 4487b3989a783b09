#!/usr/bin/env python3
"""The table of techniques in the README: `python scripts/techniques.py` prints it, by asking what each engine accepts.

Each cell is a dry run of a small Llama, on this machine's CPU and on a machine of two H200. Nothing is started.
"""

from __future__ import annotations

from launcher import compose
from launcher.config.schema import ConfigError
from launcher.prepare.prepare import prepare
from shards.errors import UserError

ENGINES = {"transformers": 1, "fsdp": 2, "tensor_parallel": 2, "deepspeed": 2, "vllm": 2}
"""The number of devices that each engine is given."""

TECHNIQUES = {
    "quantization=int8_wo": "one byte per value, a scale for each output; products in `precision`",
    "quantization=int8_dyn": "the same, with each row of inputs in 8 bits (torchao's dynamic activations)",
    "quantization=int4_wo": "half a byte per value, a scale and zero point for each 64 inputs (torchao's arithmetic)",
    "quantization=int8": "LLM.int8 of bitsandbytes: as `int8_wo`, with inputs in 8 bits except outliers",
    "quantization=nf4": "bitsandbytes: half a byte per value, a scale for each 64",
    "quantization=fp4": "the same, in floating point",
    "quantization=nf4_dq": "`nf4` with 8-bit scales",
    "quantization=fp8 precision=bf16": "vLLM's own; so are `fp8_channel` and `fp8_block`",
    "precision=bf16_mixed": "weights in fp32, products under autocast; so is `fp16_mixed`",
    "offload=cpu": "weights in main memory",
    "offload=disk": "weights in their files",
    "adapter.path=embedded:tiny_llama_adapter": "a LoRA adapter, merged while weights are read",
    "adapter.path=embedded:tiny_llama_adapter adapter.merge=false": "its factors kept separate from the weights",
    "speculative=ngram": "draft tokens by prompt lookup",
    "speculative=draft speculative.model=embedded:tiny_draft": "draft tokens by a draft model",
    "measure.compile=inductor": "steps compiled by torch.compile",
    "measure.compile=cudagraph": "steps captured as CUDA graphs",
    "measure.quality=builtin": "perplexity, and agreement with the base run of a comparison",
}
"""Options on the command line, and their meaning."""


def accepts(*overrides: str) -> bool:
    """True if a dry run accepts these overrides."""
    try:
        prepare(compose("model=tiny_llama", "dry_run=true", *overrides), ())
    except UserError:
        return False
    return True


def cell(engine: str, devices: int, technique: str) -> str:
    """`yes` if the engine supports the technique, `CUDA` or `CPU` if only there, empty if on neither."""
    asked = (f"backend={engine}", f"devices={devices}", *technique.split())
    on_cpu = accepts("accelerator=cpu", *asked)
    on_cuda = accepts(f"machine={devices}xh200", *asked)
    return {(True, True): "yes", (False, True): "CUDA", (True, False): "CPU", (False, False): ""}[on_cpu, on_cuda]


def table() -> str:
    """The table as Markdown."""
    lines = [f"| | | {' | '.join(ENGINES)} |", f"|---|---|{'---|' * len(ENGINES)}"]
    for technique, meaning in TECHNIQUES.items():
        cells = [cell(engine, devices, technique) for engine, devices in ENGINES.items()]
        lines.append(" |".join((f"| `{technique}`", f" {meaning}", *(f" {text}".rstrip() for text in cells), "")))
    return "\n".join(lines)


if __name__ == "__main__":
    for engine, devices in ENGINES.items():
        if not accepts(f"backend={engine}", f"devices={devices}"):
            raise SystemExit(ConfigError(f"backend={engine} does not run here.", "python -m launcher.doctor"))
    print(table())
