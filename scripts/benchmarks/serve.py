"""Throughput, ttft and tpot of one server as measured by `backend=endpoint` and by `vllm bench serve`.

    python scripts/benchmarks/serve.py --url http://127.0.0.1:8000 --model tiny_llama [--concurrency 4] [--rounds 10]
    python scripts/benchmarks/serve.py --url http://127.0.0.1:8000 --model tiny_llama --commands [--rounds 5]

The first command runs both clients at the same time, each with --concurrency open requests, so that disturbances affect
both. The second runs both client commands alternately, each after a warm-up with as many prompts. Prompts are random
tokens, --prompts of them in a round. Ratios (ours over the other's) are medians of the ratios of each round; the last
line is JSON. Requires vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ranks import alternating  # noqa: E402

from launcher.backends.endpoint.dialects import DIALECTS  # noqa: E402
from launcher.backends.endpoint.load import Load  # noqa: E402
from launcher.backends.endpoint.questions import Questions  # noqa: E402
from launcher.backends.endpoint.transport.client import Client  # noqa: E402
from launcher.backends.endpoint.transport.connection import Limits  # noqa: E402
from launcher.config.schema import SamplingConfig  # noqa: E402
from launcher.models import EMBEDDED  # noqa: E402
from launcher.prompts.prompts import synthetic_prompts  # noqa: E402

if TYPE_CHECKING:
    from launcher.backends.base import Prompt

CLIENTS = ("launcher", "vllm")
FIGURES = ("output_throughput", "request_throughput", "ttft_ms", "tpot_ms", "e2el_ms")
LIMIT_S = 900
VOCAB_SIZE = 256  # prompts use only ids below this, which are in the vocabulary of every model
BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser;"
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
Times = list[tuple[float, float, int]]  # for each request: ttft and latency in seconds, and the number of tokens


def main() -> None:
    options = parse()
    if options.as_client:
        be_client(options)
        return
    rounds: list[dict[str, dict[str, float]]] = []
    print(f"{'round':>5} {'client':>8}", *(f"{key:>18}" for key in FIGURES))
    measure = at_once
    if options.commands:
        measure = in_turns
    for figures in measure(options):
        rounds.append(figures)
        for name in CLIENTS:
            print(f"{len(rounds):5} {name:>8}", *(f"{figures[name][key]:18.2f}" for key in FIGURES), flush=True)
    ratios = {key: statistics.median(one["launcher"][key] / one["vllm"][key] for one in rounds) for key in FIGURES}
    print(f"{'':5} {'ratio':>8}", *(f"{ratios[key]:18.3f}" for key in FIGURES))
    print(json.dumps({"load_average": os.getloadavg(), "ratios": ratios, "rounds": rounds}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of a server, without /v1")
    parser.add_argument("--model", default="tiny_llama", help="its name at the server; a folder, or an embedded one")
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--as-client", choices=CLIENTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def at_once(options: argparse.Namespace) -> Any:
    """Yields the figures of each round, in which both clients send requests at the same time; one extra round warms
    up."""
    command = [sys.executable, __file__, *sys.argv[1:], "--as-client"]
    children = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in CLIENTS
    }
    try:
        for number in range(options.rounds + 1):
            for child in children.values():
                assert child.stdin is not None
                child.stdin.write(f"{number}\n")
                child.stdin.flush()
            lines = {name: child.stdout.readline() for name, child in children.items() if child.stdout}
            if number:
                yield {name: json.loads(line) for name, line in lines.items()}
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def be_client(options: argparse.Namespace) -> None:
    """Run as one client: for each round number on stdin, print the figures of that round."""
    ask, part = {"launcher": (ask_as_launcher, 0), "vllm": (ask_as_vllm, 1)}[options.as_client]
    for line in sys.stdin:
        prompts = synthetic_prompts(options.prompts, options.prompt_tokens, VOCAB_SIZE, seed=2 * int(line) + part)
        start = perf_counter()
        times = asyncio.run(ask(options, prompts))
        wall_s = perf_counter() - start
        assert [new for _, _, new in times] == [options.new_tokens] * options.prompts
        figures = {
            "output_throughput": sum(new for _, _, new in times) / wall_s,
            "request_throughput": len(times) / wall_s,
            "ttft_ms": statistics.median(ttft for ttft, _, _ in times) * 1000,
            "tpot_ms": statistics.median((latency - ttft) / (new - 1) for ttft, latency, new in times) * 1000,
            "e2el_ms": statistics.median(latency for _, latency, _ in times) * 1000,
        }
        print(json.dumps(figures), flush=True)


async def ask_as_launcher(options: argparse.Namespace, prompts: list[Prompt]) -> Times:
    """Send the prompts as `backend=endpoint load.concurrency=` does."""
    times: Times = []
    sampling = SamplingConfig(max_new_tokens=options.new_tokens, ignore_eos=True)
    async with Client(options.url, Limits()) as client:
        questions = Questions(client, DIALECTS["vllm"], Path(options.model).name, sampling)

        async def send(prompt: Prompt) -> None:
            answer = await questions.ask(prompt, "salt")
            assert answer.failure is None, answer.failure
            times.append((answer.pieces_s[0], answer.pieces_s[-1], answer.new_tokens))

        await Load(send, options.concurrency).run(prompts)
    return times


async def ask_as_vllm(options: argparse.Namespace, prompts: list[Prompt]) -> Times:
    """As `vllm bench serve --backend openai --max-concurrency` does, with its function, session and semaphore."""
    aiohttp = importlib.import_module("aiohttp")  # only the process of this client has vLLM and what it needs
    bench = importlib.import_module("vllm.benchmarks.lib.endpoint_request_func")
    most = options.concurrency
    connector = aiohttp.TCPConnector(limit=most, limit_per_host=most, ttl_dns_cache=300, keepalive_timeout=60)
    semaphore = asyncio.Semaphore(most)

    async def send(prompt: Prompt, session: Any) -> tuple[float, float, int]:
        asked = bench.RequestFuncInput(
            list(prompt.token_ids), f"{options.url}/v1/completions", len(prompt.token_ids), options.new_tokens,
            Path(options.model).name, extra_body={"temperature": 0}, ignore_eos=True,
        )  # fmt: skip
        async with semaphore:
            output = await bench.async_request_openai_completions(asked, session)
        assert output.success, output.error
        return output.ttft, output.latency, output.output_tokens

    async with aiohttp.ClientSession(connector=connector, trust_env=True) as session:
        return list(await asyncio.gather(*(send(prompt, session) for prompt in prompts)))


def in_turns(options: argparse.Namespace) -> Any:
    """Yields the figures of each round, in which the two commands run one after the other."""
    for number in range(options.rounds):
        run = {"launcher": run_launcher, "vllm": run_bench}
        yield {name: run[name](options, number) for name in alternating(CLIENTS, number)}


def run_launcher(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """The figures of `python -m launcher backend=endpoint`."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "backend=endpoint", f"backend.url={options.url}", f"model={options.model}", "prompts=synthetic",
            f"prompts.count={options.prompts}", f"prompts.input_tokens={options.prompt_tokens}", f"seed={seed}",
            f"prompts.output_tokens={options.new_tokens}", f"load.concurrency={options.concurrency}",
            "measure.repeats=1", f"output_dir={folder}",
        ]  # fmt: skip
        run_quietly([sys.executable, "-m", "launcher", *words])
        (path,) = Path(folder).glob("*/record.json")
        metrics = json.loads(path.read_text())["metrics"]
    return {
        "output_throughput": metrics["new_tokens_per_s"]["median"],
        "request_throughput": metrics["request_throughput"]["median"],
        **{f"{key}_ms": metrics[f"{key}_s"]["p50"] * 1000 for key in ("ttft", "tpot", "e2el")},
    }


def run_bench(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """The figures of `vllm bench serve`, after a warm-up with as many requests as are measured."""
    tokenizer = options.model
    if (EMBEDDED / options.model).is_dir():
        tokenizer = str(EMBEDDED / options.model)
    with tempfile.TemporaryDirectory() as results:
        words = [
            "--backend", "openai", "--base-url", options.url, "--endpoint", "/v1/completions",
            "--model", options.model, "--tokenizer", tokenizer,
            "--dataset-name", "random", "--random-input-len", str(options.prompt_tokens),
            "--random-output-len", str(options.new_tokens), "--num-prompts", str(options.prompts),
            "--num-warmups", str(options.prompts), "--max-concurrency", str(options.concurrency), "--seed", str(seed),
            "--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm",
            "--save-result", "--result-dir", results, "--result-filename", "result.json",
        ]  # fmt: skip
        run_quietly([sys.executable, "-c", BENCH, *words])
        result = json.loads((Path(results) / "result.json").read_text())
    assert result["completed"] == options.prompts, f"{result['failed']} requests failed"
    return {
        "output_throughput": result["output_throughput"],
        "request_throughput": result["request_throughput"],
        **{f"{key}_ms": result[f"median_{key}_ms"] for key in ("ttft", "tpot", "e2el")},
    }


def run_quietly(command: list[str]) -> None:
    """Run a command; if it fails, exit with its output."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT, check=False)
    if ended.returncode:
        sys.exit(f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")


if __name__ == "__main__":
    main()
