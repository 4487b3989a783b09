"""Loading a large checkpoint on several ranks: this project's loader beside transformers' own, in one interleaved run.

    python scripts/benchmarks/load.py --size-gb 4 --ranks 2 --folder /tmp

A random checkpoint in bfloat16 is written to --folder and removed at the end. Cold means that its pages are dropped
from the page cache before the ranks start together, warm that all of them have been read before. The clock stops when
one byte in each page of every parameter has been read, so that the model can run. Bytes are what the kernel read from
disk for a rank (read_bytes in /proc/self/io); memory is the peak of a rank's anonymous memory minus what it holds
afterwards.

The weights are stored in bfloat16. With another --dtype they are cast, for which every loader needs memory. Without a
cast this loader and transformers' own both map the files, and their memory is the page cache.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

from shards.checkpoint.checkpoint import Checkpoint
from shards.load.blocks import local_block, local_bytes
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.parallel.fully_shard import fully_shard_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODES = {
    "shards": "this loader: each rank reads its shards",
    "sharded": "from_pretrained(distributed_config=fsdp)",
    "plain": "from_pretrained, the whole model on each rank",
    "whole": "from_pretrained, then fully_shard",
}
HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 8192, 32000
LIMIT_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=4.0)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on a disk, not in memory")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        print(json.dumps(run_rank(arguments.folder, arguments.repeats, getattr(torch, arguments.dtype))))
        return
    need, free = arguments.size_gb * 1e9, shutil.disk_usage(arguments.folder).free
    if free < 1.5 * need:
        sys.exit(f"{arguments.folder} has {free / 1e9:.1f} GB free, {1.5 * need / 1e9:.1f} are needed.")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark_load_") as name:
        total = write_checkpoint(Path(name), need, arguments.files)
        report(compare(arguments, Path(name)), total, arguments.ranks)


def write_checkpoint(folder: Path, size: float, files: int) -> int:
    """Write a bfloat16 Llama of about `size` bytes with random weights to `files` files; returns its exact bytes."""
    layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=16,
        num_hidden_layers=max(1, round((size - 4 * VOCABULARY * HIDDEN) / layer)), dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    tensors = list(build_meta(config, torch.bfloat16).named_parameters())
    noise = (torch.randn(8 << 20) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    weight_map = {}
    for number in range(files):
        part = tensors[number * len(tensors) // files : (number + 1) * len(tensors) // files]
        write_safetensors(
            folder / f"model-{number}.safetensors", [(n, list(p.shape), p.nbytes) for n, p in part], noise
        )
        weight_map.update({name: f"model-{number}.safetensors" for name, _ in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(parameter.nbytes for _, parameter in tensors)


def write_safetensors(path: Path, tensors: Sequence[tuple[str, list[int], int]], noise: bytes) -> None:
    header, end = {}, 0
    for name, shape, nbytes in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligned as by the safetensors library
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for first in range(0, end, len(noise)):
            stream.write(noise[: end - first])
        stream.flush()
        os.fsync(stream.fileno())


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each combination of repeat, cold or warm, mode and rank."""
    command = [
        sys.executable, __file__, "--as-rank", "--folder", str(folder), "--dtype", arguments.dtype,
        "--repeats", str(arguments.repeats),
    ]  # fmt: skip
    return run_ranks(command, arguments.ranks, 1, LIMIT_S)


def run_rank(folder: Path, repeats: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The rows of this rank: the modes take turns, and the first turn of each is not counted."""
    dist.init_process_group("gloo")
    rows = []
    for repeat in range(-1, repeats):
        for warm in (False, True):
            for mode in MODES:
                row = {"mode": mode, "warm": warm, "repeat": repeat, **load_once(mode, folder, warm, dtype)}
                if repeat >= 0:
                    rows.append(row)
    dist.destroy_process_group()
    return rows


def load_once(mode: str, folder: Path, warm: bool, dtype: torch.dtype) -> dict[str, Any]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    if dist.get_rank() == 0:
        prepare = drop_pages
        if warm:
            prepare = read_all
        prepare(folder)
    dist.barrier()
    with Watch() as watch:
        model = LOADERS[mode](folder, dtype)
        for parameter in model.parameters():
            touch(parameter)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return {"held_bytes": local_bytes(model), **watch.result}


def touch(parameter: torch.Tensor) -> None:
    local_block(parameter)[1].reshape(-1).view(torch.uint8)[::4096].max()


def load_shards(folder: Path, dtype: torch.dtype) -> Any:
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    model = fully_shard_model(build_meta(folder, dtype), mesh)
    load_weights(model, Checkpoint.open(folder), "cpu")
    return model


def load_sharded(folder: Path, dtype: torch.dtype) -> Any:
    config = DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config)


def load_plain(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def load_whole(folder: Path, dtype: torch.dtype) -> Any:
    return fully_shard_model(load_plain(folder, dtype), init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),)))


LOADERS: dict[str, Callable[[Path, torch.dtype], Any]] = {
    "shards": load_shards,
    "sharded": load_sharded,
    "plain": load_plain,
    "whole": load_whole,
}


class Watch:
    """Time, bytes from disk and the rise of anonymous memory of this process between enter and exit."""

    def __enter__(self) -> Watch:
        self._before = anonymous_bytes()
        self._peak = self._before
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        self._read, self._began = read_bytes(), time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        seconds, read = time.perf_counter() - self._began, read_bytes() - self._read
        self._done.set()
        self._sampler.join()
        peak = max(self._peak, anonymous_bytes()) - self._before
        self.result = {"seconds": seconds, "read_bytes": read, "anonymous_bytes": peak}


def anonymous_bytes() -> int:
    return field(Path("/proc/self/status"), "RssAnon") * 1024


def read_bytes() -> int:
    return field(Path("/proc/self/io"), "read_bytes")


def field(path: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{name}:"))


def drop_pages(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as stream:
            while stream.read(16 << 20):
                pass


def report(rows: list[dict[str, Any]], total: int, ranks: int) -> None:
    shard = total / ranks
    print(
        f"{total / 1e9:.2f} GB on {ranks} ranks, shard {shard / 1e9:.2f} GB; medians over repeats of the slowest rank"
    )
    print(f"{'':46}  cold s  warm s  cold ratio  warm ratio  read/shard  anonymous - held, MB")
    summary = {mode: summarise(rows, mode, shard) for mode in MODES}
    for mode, text in MODES.items():
        values, ours = summary[mode], summary["shards"]
        cold, warm = values["cold_s"] / ours["cold_s"], values["warm_s"] / ours["warm_s"]
        print(
            f"{text:46}  {values['cold_s']:6.2f}  {values['warm_s']:6.2f}  {cold:10.2f}  {warm:10.2f}"
            f"  {values['read_per_shard']:10.3f}  {values['anonymous_over_held_bytes'] / 1e6:21.0f}"
        )
        values |= {"cold_ratio": cold, "warm_ratio": warm}
    print(json.dumps({"total_bytes": total, "ranks": ranks, "shard_bytes": shard, **summary}))


def summarise(rows: list[dict[str, Any]], mode: str, shard: float) -> dict[str, float]:
    """Median times of the slowest rank, and maxima over the ranks: bytes read (cold) and anonymous memory."""
    mine = [row for row in rows if row["mode"] == mode]

    def seconds(warm: bool) -> float:
        repeats = {row["repeat"] for row in mine}
        return statistics.median(
            max(row["seconds"] for row in mine if (row["repeat"], row["warm"]) == (repeat, warm)) for repeat in repeats
        )

    return {
        "cold_s": seconds(False),
        "warm_s": seconds(True),
        "read_per_shard": max(row["read_bytes"] for row in mine if not row["warm"]) / shard,
        "anonymous_over_held_bytes": max(row["anonymous_bytes"] - row["held_bytes"] for row in mine),
        "held_bytes": max(row["held_bytes"] for row in mine),
    }


if __name__ == "__main__":
    main()
