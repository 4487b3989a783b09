"""All engines beside what one would write without this project, in one run, in turns.

    python scripts/benchmark_engines.py [--models tiny_llama,random_1gb] [--engines fsdp,vllm] [--precisions fp32]
                                        [--repeats 5] [--new-tokens 32] [--ranks 2] [--within SECONDS]
                                        [--output docs/benchmarks]

For each model and precision, every contestant is started once and answers the same prompts, all at once, with the same
number of slots. They take turns in a new random order every round, while the others are stopped, so that disturbances
affect all of them; the first round is not counted. The embedded models answer tests/ragged_prompts.txt up to EOS, the
random Llamas answer prompts of 8 to 80 tokens with --new-tokens tokens (the 1 GB model with a quarter of that). Ratios
are medians of the ratios of each round. --output writes all figures to NAME.json and the tables to NAME.md. --within
limits the time: a round only starts if it can end in time, and a model gets more than five rounds only within its share
of the time. litgpt takes part if it is installed, or if LITGPT_PYTHON is an interpreter that has it. A contestant for
which main memory has no room beside the others is not started, and its row says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "benchmarks")]

from engine_tables import markdown, write  # noqa: E402
from random_llamas import RANDOM, write_random  # noqa: E402
from turns import Group  # noqa: E402

from launcher.backends.base import Prompt  # noqa: E402
from launcher.composition.compose import compose_run  # noqa: E402
from launcher.models import EMBEDDED  # noqa: E402
from launcher.prepare.planning import plan_of  # noqa: E402
from launcher.prompts.prompts import encode  # noqa: E402

FIRST, LONGEST = 8, 80  # lengths of the shortest and the longest prompt for random models, in tokens
BASE = "model.generate"
MODELS = ("tiny_falcon", "tiny_llama", *RANDOM)
FEWER = {"random_1gb": 4}
"""Divisor of --new-tokens, for large models."""
WEIGHTS = {"random_100mb": 2, "random_1gb": 8}
"""Weights of models that need a larger share of the time than the embedded models, whose weight is 1."""
LEAST_ROUNDS = 5
"""Rounds of each model, at least, even if they take more than its share of the time."""
PROCESS_BYTES = 1 << 30
"""Upper bound of the main memory of a process in addition to its weights."""


@dataclass(frozen=True)
class Contestant:
    """One entry of the comparison. `kind` is a key of CONTESTANTS in benchmarks/contestant.py; `reference` names the
    contestant to compare it with; `like` are the overrides of the run whose plan gives its ceiling: for an engine of
    this project, those of its own run."""

    name: str
    kind: str
    reference: str
    like: tuple[str, ...]
    ranks: bool = False  # True: one process per device
    devices: int | None = None  # None: the value of --ranks
    needs: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def ours(name: str, reference: str, *overrides: str, **more: Any) -> Contestant:
    return Contestant(name, "ours", reference, overrides, **more)


BARE_VLLM: dict[str, Any] = {"arguments": {}, "environment": {}}

CONTESTANTS = (
    Contestant("model.generate", "model.generate", "model.generate", ("backend=transformers",), devices=1),
    ours("transformers", "model.generate", "backend=transformers", devices=1),
    ours("transformers compiled", "model.generate", "backend=transformers", "measure.compile=inductor", devices=1),
    ours("fsdp x1", "transformers", "backend=fsdp", devices=1),
    Contestant("Fabric FSDP2 + generate", "fabric", "model.generate", ("backend=fsdp",), ranks=True),
    ours("fsdp", "Fabric FSDP2 + generate", "backend=fsdp", ranks=True),
    ours("fsdp all resident", "Fabric FSDP2 + generate", "backend=fsdp", "backend.resident_layers=auto", ranks=True),
    Contestant("deepspeed.init_inference", "deepspeed", "model.generate", ("backend=deepspeed",), ranks=True),
    ours("deepspeed", "deepspeed.init_inference", "backend=deepspeed", ranks=True),
    Contestant("vllm.LLM", "vllm", "model.generate", ("backend=vllm",), needs="vllm", more=BARE_VLLM),
    ours("vllm", "vllm.LLM", "backend=vllm", needs="vllm"),
    Contestant("vllm.LLM x1", "vllm", "model.generate", ("backend=vllm",), needs="vllm", more=BARE_VLLM, devices=1),
    ours("vllm x1", "vllm.LLM x1", "backend=vllm", needs="vllm", devices=1),
    ours("tensor_parallel", "vllm", "backend=tensor_parallel", ranks=True),
    Contestant("litgpt", "litgpt", "model.generate", ("backend=transformers",), devices=1, needs="litgpt",
               more={"python": os.environ.get("LITGPT_PYTHON")}),
)  # fmt: skip


def job_of(model: str, folder: Path, precision: str, count: int, new_tokens: int) -> dict[str, Any]:
    """The job that all contestants get."""
    fields = json.loads((folder / "config.json").read_text())
    is_random = model in RANDOM
    if is_random:
        chance = random.Random(0)
        lengths = [FIRST + (LONGEST - FIRST) * place // max(1, count - 1) for place in range(count)]
        prompts = [[chance.randrange(5, fields["vocab_size"]) for _ in range(length)] for length in lengths]
    else:
        texts = (ROOT / "tests" / "ragged_prompts.txt").read_text().splitlines()
        prompts = [list(prompt.token_ids) for prompt in encode(texts, folder)]
    return {
        "folder": str(folder), "precision": precision, "prompts": prompts, "new_tokens": new_tokens,
        "ignore_eos": is_random, "eos": fields["eos_token_id"],
    }  # fmt: skip


def ceiling(like: tuple[str, ...], job: dict[str, Any]) -> float | None:
    """The upper limit of decode tokens/s by the plan of a run and the measured rates of this machine."""
    config = compose_run([
        *like, "accelerator=cpu", f"devices={job['devices']}", f"precision={job['precision']}",
        f"sampling.max_new_tokens={job['new_tokens']}",
    ])  # fmt: skip
    config.model.path, config.measure.batch_size = job["folder"], len(job["prompts"])
    fields = json.loads((Path(job["folder"]) / "config.json").read_text())
    prompts = [Prompt(index, "", tuple(row)) for index, row in enumerate(job["prompts"])]
    plan = plan_of(config, fields, None, prompts, False)
    if plan is None or plan.limit is None:
        return None
    return plan.limit.tokens_per_s


def measure(
    groups: list[Group], repeats: int, share: float, end: float, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """One entry per round: seconds and answers of each contestant by name.

    The warm-up and the first round are made even after `end`. The next rounds up to `LEAST_ROUNDS` must end before
    `end`, later ones before `share`; a round is assumed to take as long as the previous one.
    """
    rounds, chance = [], random.Random(0)
    began = time.monotonic()
    for number in range(repeats + 1):
        before, began = began, time.monotonic()
        if rounds and began + (began - before) > (share if len(rounds) >= LEAST_ROUNDS else end):
            break
        row = {"load_average": os.getloadavg()[0]}
        for group in chance.sample(groups, len(groups)):
            if not group.failure and (parts := group.turn()):
                answers = {int(index): ids for part in parts for index, ids in part["answers"].items()}
                row[group.name] = (max(part["seconds"] for part in parts), answers)
            tick()
        if number:
            rounds.append(row)
    return rounds


def rows_of(groups: list[Group], rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of one model and precision: one row per contestant."""
    rows = []
    for group in groups:
        contestant = next(one for one in CONTESTANTS if one.name == group.name)
        turns = [row[group.name] for row in rounds if group.name in row]
        if not turns:
            rows.append({"name": group.name, "failure": group.failure or "no round was completed"})
            continue
        speeds = list(map(speed_of, turns))
        base, limit = rounds[0].get(BASE), ceiling(contestant.like, group.job)
        rows.append({
            "name": group.name, "load_s": group.load_s, "tokens_per_s": statistics.median(speeds), "rounds": speeds,
            "of_base": ratio(rounds, group.name, BASE), "reference": contestant.reference,
            "of_reference": ratio(rounds, group.name, contestant.reference), "ceiling": limit,
            "share_of_ceiling": limit and statistics.median(speeds) / limit, "answers": len(turns[0][1]),
            "same_answers": base and sum(base[1].get(index) == ids for index, ids in turns[0][1].items()),
        })  # fmt: skip
    return rows


def speed_of(turn: tuple[float, dict[int, list[int]]]) -> float:
    """New tokens/s of one contestant in one round."""
    seconds, answers = turn
    return sum(map(len, answers.values())) / seconds


def ratio(rounds: list[dict[str, Any]], name: str, other: str) -> float | None:
    """The median of the ratios of the speeds of two contestants in each round."""
    ratios = [speed_of(row[name]) / speed_of(row[other]) for row in rounds if name in row and other in row]
    if not ratios:
        return None
    return statistics.median(ratios)


def weight_of(points: list[tuple[str, str]]) -> float:
    return sum(WEIGHTS.get(model, 1) for model, _ in points)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--engines", default=",".join(one.name for one in CONTESTANTS), help="contestants by name")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16, help="of the random models")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--within", type=float, default=math.inf, help="seconds for everything")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    for text, known in ((options.models, MODELS), (options.engines, [one.name for one in CONTESTANTS])):
        if unknown := set(text.split(",")) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    return options


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # run the `finally` that ends contestants
    chosen = [
        one
        for one in CONTESTANTS
        if one.name in options.engines.split(",")
        and (not one.needs or one.more.get("python") or importlib.util.find_spec(one.needs))
    ]
    points = [(model, kind) for kind in options.precisions.split(",") for model in options.models.split(",")]
    out, results, end = Console(stderr=True), [], time.monotonic() + options.within
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as progress:
        task = progress.add_task("", total=len(points) * len(chosen) * (options.repeats + 2))
        spent = 0.0
        for number, (model, precision) in enumerate(points):
            now = time.monotonic()
            share = now + (end - now) * WEIGHTS.get(model, 1) / weight_of(points[number:])
            if now + spent / 2 > end:
                print(f"{model}, {precision}: not run, no time was left", flush=True)
                continue
            progress.update(task, description=f"{model} {precision}")
            results.append(run_point(model, precision, chosen, options, (share, end), lambda: progress.advance(task)))
            spent = time.monotonic() - now
            print(markdown(results[-1:]), flush=True)
            if options.output:
                write(options.output, results)


def run_point(
    model: str,
    precision: str,
    chosen: list[Contestant],
    options: argparse.Namespace,
    ends: tuple[float, float],
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Start all contestants, let them take turns by `measure`, and end them. `ends` are its arguments `share` and
    `end`."""
    groups: list[Group] = []
    with tempfile.TemporaryDirectory(prefix="benchmark_engines_") as scratch:
        folder = EMBEDDED / model
        if model in RANDOM:
            folder = Path(scratch) / model
            folder.mkdir()
            write_random(folder, RANDOM[model], precision)
        new_tokens = options.new_tokens // FEWER.get(model, 1)
        job = job_of(model, folder, precision, options.prompts, new_tokens)
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        try:
            for number, one in enumerate(chosen):
                devices = one.devices or options.ranks
                job_of_one = {**job, "kind": one.kind, "devices": devices, "overrides": one.like, **one.more}
                processes = options.ranks if one.ranks else 1
                group = Group(one.name, job_of_one, processes, Path(scratch) / f"{number}.log")
                groups.append(group)
                needed, free = devices * (weights + PROCESS_BYTES), psutil.virtual_memory().available
                if free < needed:
                    group.failure = f"not started: {free / 1e9:.1f} GB of memory free, {needed / 1e9:.1f} needed"
                else:
                    group.start()
                tick()
            rounds = measure(groups, options.repeats, *ends, tick)
            rows = rows_of(groups, rounds)
        finally:
            for group in groups:
                group.end()
    loads = [row["load_average"] for row in rounds]
    return {"model": model, "precision": precision, "prompts": len(job["prompts"]), "load_average": loads, "rows": rows}


if __name__ == "__main__":
    main()
