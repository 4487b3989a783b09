"""Quantized weights of a random Llama: bytes of a rank, memory while loading, and speed compared with bf16.

    python scripts/benchmarks/quantized.py --size-gb 1 --folder /tmp

The checkpoint is written to --folder in bfloat16 and removed at the end. Bytes are a rank's parameters, divided by
those of the same engine without quantization. Memory is the peak of a rank's anonymous memory while loading, minus what
it holds afterwards. Speed is that of one token through the whole model under `transformers`, alternating with bfloat16.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from load import Watch, write_safetensors
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig

from launcher.config.engines import engines
from launcher.report.units import figure
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.blocks import local_bytes
from shards.load.load import LoadStats, load_weights
from shards.load.meta import build_meta
from shards.load.quantized.quantizers import make_quantizer
from shards.machine.hardware import CPU
from shards.machine.world import World
from shards.model.known_shape import known_shape
from shards.model.quantization import known_quantization
from shards.parallel.collectives import collectives
from shards.parallel.fully_shard import fully_shard_model
from shards.parallel.products import pack_weights, quantize_layers
from shards.parallel.tensor_parallel import tensor_parallel_model
from shards.plan.request import PlanRequest

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 1024, 2816, 512, 16
LIMIT_S = 1800
RANKS = {"transformers": 1, "tensor_parallel": 2, "fsdp": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--engines", default=",".join(RANKS))
    parser.add_argument("--techniques", help="those of `quantization=`; all that an engine has, if left out")
    parser.add_argument("--tokens", type=int, default=8, help="for the speed; 0: bytes and memory only")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        print(json.dumps(run_rank(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark_quantized_") as name:
        write_checkpoint(Path(name), arguments.size_gb * 1e9)
        rows = [row for engine in arguments.engines.split(",") for row in measure(engine, arguments, Path(name))]
    report(rows)


def write_checkpoint(folder: Path, size: float) -> None:
    """Write a bfloat16 Llama of about `size` bytes, nearly all of them in its decoder layers."""
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=HEADS,
        num_hidden_layers=max(1, round(size / layer)), dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    noise = (torch.randn(8 << 20) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    parameters = build_meta(config, torch.bfloat16).named_parameters()
    write_safetensors(folder / "model.safetensors", [(n, list(p.shape), p.nbytes) for n, p in parameters], noise)


def measure(engine: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each rank and technique of an engine, measured in separate processes."""
    known = engines()[engine].quantizations
    techniques = [name for name in (arguments.techniques or ",".join(known)).split(",") if name in known]
    command = [
        sys.executable, __file__, "--as-rank", engine, "--folder", str(folder), "--tokens", str(arguments.tokens),
        "--techniques", ",".join(["none", *techniques]),
    ]  # fmt: skip
    ranks = RANKS[engine]
    return run_ranks(command, ranks, max(1, (os.cpu_count() or 1) // ranks), LIMIT_S)


def run_rank(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    engine, rows, models = arguments.as_rank, [], {}
    world = World.from_env(os.environ)
    dist.init_process_group("gloo")
    for technique in arguments.techniques.split(","):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with Watch() as watch:
            model, stats = load(engine, technique, arguments.folder, world)
        nbytes, over = local_bytes(model), watch.result["anonymous_bytes"]
        if technique != "none":
            over -= nbytes
        row = {"engine": engine, "technique": technique, "rank": world.rank, "parameter_bytes": nbytes}
        row["planned_over_bytes"] = planned_over_bytes(engine, technique, arguments.folder, world.world_size)
        rows.append({**row, "anonymous_over_held_bytes": over, "read_s": stats.read_s, "quantize_s": stats.quantize_s})
        if engine == "transformers" and arguments.tokens:
            pack_weights(model)
            models[technique] = model
    for technique, ratio in speeds(models, arguments.tokens).items():
        next(row for row in rows if row["technique"] == technique)["speed_over_bf16"] = ratio
    dist.destroy_process_group()
    return rows


def planned_over_bytes(engine: str, technique: str, folder: Path, ranks: int) -> int:
    """Host memory per rank that the plan expects during loading, in addition to the weights."""
    planner = engines()[engine].planner_class
    assert planner is not None
    request = PlanRequest(
        shape=known_shape(json.loads((folder / "config.json").read_text())), engine=planner(),
        devices=ranks, device=CPU, quantization=known_quantization(technique),
    )  # fmt: skip
    return (request.engine.load_host_bytes(request) or 0) // ranks


def load(engine: str, technique: str, folder: Path, world: World) -> tuple[torch.nn.Module, LoadStats]:
    """The model as an engine holds it on this rank."""
    model = build_meta(folder, torch.bfloat16)
    if engine == "tensor_parallel":
        ways = collectives(world, torch.device("cpu"))
        tensor_parallel_model(model, world.rank, world.world_size, ways)
    if technique != "none":
        quantize_layers(model, make_quantizer(technique, torch.bfloat16))
    if engine == "fsdp":
        fully_shard_model(model, init_device_mesh("cpu", (world.world_size,)))
    return model, load_weights(model, Checkpoint.open(folder), "cpu")


@torch.inference_mode()
def speeds(models: dict[str, torch.nn.Module], tokens: int) -> dict[str, float]:
    """The speed of each model relative to the plain one, from median times per token; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(tokens + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(input_ids=torch.tensor([[5]]), use_cache=False)
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {name: medians["none"] / median for name, median in medians.items()}


def report(rows: list[dict[str, Any]]) -> None:
    plain = {(row["engine"], row["rank"]): row["parameter_bytes"] for row in rows if row["technique"] == "none"}
    print("engine           rank  quantization  MB  over bf16  loading, MB above  read s  quantize s  speed over bf16")
    for row in rows:
        row["bytes_over_bf16"] = row["parameter_bytes"] / plain[row["engine"], row["rank"]]
        speed = figure(row.get("speed_over_bf16"), ".2f")
        print(
            f"{row['engine']:15} {row['rank']:5}  {row['technique']:10} {row['parameter_bytes'] / 1e6:6.0f}"
            f"  {row['bytes_over_bf16']:9.3f}  {row['anonymous_over_held_bytes'] / 1e6:17.0f}"
            f"  {row['read_s']:6.2f}  {row['quantize_s']:10.2f}  {speed:>15}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
