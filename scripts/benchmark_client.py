"""What the client of `backend=endpoint` adds to a server's times, beside the client of `vllm bench serve`, in turns.

    python scripts/benchmark_client.py [--streams 1,8,64] [--tokens 100] [--rounds 5] [--step-ms 20]
    python scripts/benchmark_client.py --url http://127.0.0.1:8000 --model tiny_llama [--concurrency 8] [--rounds 5]

The first asks tests/helpers/fake_server.py, all of whose streams send a token every --step-ms and say when they did.
The delay is from there to the moment that a client has for the token; the CPU time is that of the client's process.
The second runs both commands on a server that runs: the same number of prompts, of the same lengths.
Figures are medians over the rounds, ratios those of each round; the last line is JSON. Needs vLLM beside this project.
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
from itertools import accumulate
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from launcher.backends.base import Prompt  # noqa: E402
from launcher.backends.endpoint.client import Client  # noqa: E402
from launcher.backends.endpoint.connection import Exchange, Limits  # noqa: E402
from launcher.backends.endpoint.dialects import DIALECTS  # noqa: E402
from launcher.backends.endpoint.load import Load  # noqa: E402
from launcher.backends.endpoint.questions import Questions  # noqa: E402
from launcher.config.schema import SamplingConfig  # noqa: E402
from launcher.models import EMBEDDED  # noqa: E402

FAKE_SERVER = ROOT / "tests" / "helpers" / "fake_server.py"
CLIENTS = ("launcher", "vllm")
LIMIT_S = 900
BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser;"
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
PROMPT_IDS = (5, 7, 9, 11)
Times = list[tuple[float, float]]  # when a token was sent, and when a client says that it came


def main() -> None:
    options = parse()
    if options.as_client:
        be_client(options.as_client, options.url)
    elif options.url:
        compare_commands(options)
    else:
        compare_delays(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=lambda text: [int(item) for item in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=100, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--url", help="of a server, without /v1")
    parser.add_argument("--model", default="tiny_llama", help="an embedded model, or a folder; its name at the server")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--as-client", choices=CLIENTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare_delays(options: argparse.Namespace) -> None:
    """Both clients against the server that says when it sent what."""
    server = subprocess.Popen(
        [sys.executable, str(FAKE_SERVER), "0", str(options.step_ms / 1000)], stdout=subprocess.PIPE, text=True
    )
    children: dict[str, subprocess.Popen[str]] = {}
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/timed"
        for name in CLIENTS:
            command = [sys.executable, __file__, "--as-client", name, "--url", url]
            children[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            turn(children[name], 1, 10)
        print(f"{'streams':>7} {'client':>8} {'p50 us':>8} {'mean us':>8} {'p99 us':>8} {'CPU us/token':>12}")
        rows = []
        for streams in options.streams:
            rounds = []
            for number in range(options.rounds):
                order = CLIENTS[:: 1 if number % 2 else -1]
                rounds.append({name: turn(children[name], streams, options.tokens) for name in order})
            rows += [summary(name, streams, rounds) for name in CLIENTS]
            for row in rows[-2:]:
                figures = (f"{row[key]:8.0f}" for key in ("p50_us", "mean_us", "p99_us"))
                print(f"{streams:7} {row['client']:>8}", *figures, f"{row['cpu_us']:12.1f}", flush=True)
            print(f"{'':7} {'ratio':>8} {rows[-1]['p50_ratio']:8.3f} {rows[-1]['mean_ratio']:8.3f}", flush=True)
    finally:
        for process in (server, *children.values()):
            process.kill()
            process.wait()
    print(json.dumps({"load_average": os.getloadavg(), "rows": rows}))


def turn(child: subprocess.Popen[str], streams: int, tokens: int) -> dict[str, float]:
    """One turn of a client."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{streams} {tokens}\n")
    child.stdin.flush()
    result: dict[str, float] = json.loads(child.stdout.readline())
    return result


def summary(name: str, streams: int, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The medians of a client over the rounds; ratios are ours over the other's."""
    keys = ("p50_us", "mean_us", "p99_us", "cpu_us")
    ratios = {
        key.replace("_us", "_ratio"): statistics.median(one["launcher"][key] / one["vllm"][key] for one in rounds)
        for key in keys
    }
    medians = {key: statistics.median(one[name][key] for one in rounds) for key in keys}
    return {"client": name, "streams": streams, **medians, **ratios}


def be_client(name: str, url: str) -> None:
    """Take turns as one client: numbers of streams and tokens come in, figures go out."""
    ask = ask_as_launcher if name == "launcher" else ask_as_vllm
    for line in sys.stdin:
        streams, tokens = (int(word) for word in line.split())
        before = process_time()
        times = asyncio.run(ask(url, streams, tokens))
        cpu_s = process_time() - before
        delays = sorted(came - sent for sent, came in times)
        assert len(delays) == streams * tokens, f"{len(delays)} tokens came"
        figures = {
            "p50_us": statistics.median(delays),
            "mean_us": statistics.fmean(delays),
            "p99_us": delays[len(delays) * 99 // 100],
            "cpu_us": cpu_s / len(delays),
        }
        print(json.dumps({key: value * 1e6 for key, value in figures.items()}), flush=True)


class KeepingClient(Client):
    """Ours, which also keeps when it sent its last request: answers count from there."""

    async def post(self, *arguments: Any) -> Exchange:
        exchange = await super().post(*arguments)
        self.last_sent_at = exchange.sent_at
        return exchange


async def ask_as_launcher(url: str, streams: int, tokens: int) -> Times:
    """As `backend=endpoint` does with so many requests at once."""
    times: Times = []

    async def send(index: int) -> None:
        async with KeepingClient(url, Limits()) as client:
            questions = Questions(client, DIALECTS["vllm"], "fake", SamplingConfig(max_new_tokens=tokens))
            answer = await questions.ask(Prompt(index, "", PROMPT_IDS), "salt")
        assert answer.failure is None, answer.failure
        came = [client.last_sent_at + moment for moment in answer.pieces_s]
        times.extend(zip(map(float, answer.text.split()), came, strict=True))

    await Load(send).run(range(streams))
    return times


async def ask_as_vllm(url: str, streams: int, tokens: int) -> Times:
    """As `vllm bench serve --backend openai` does, with its function and its settings of the session."""
    aiohttp = importlib.import_module("aiohttp")  # only the process of this client has vLLM and what it needs
    bench = importlib.import_module("vllm.benchmarks.lib.endpoint_request_func")
    connector = aiohttp.TCPConnector(
        limit=streams, limit_per_host=streams, ttl_dns_cache=300, keepalive_timeout=60, enable_cleanup_closed=True
    )
    asked = bench.RequestFuncInput(list(PROMPT_IDS), f"{url}/v1/completions", len(PROMPT_IDS), tokens, "fake")
    async with aiohttp.ClientSession(connector=connector, trust_env=True) as session:
        outputs = await asyncio.gather(
            *(bench.async_request_openai_completions(asked, session) for _ in range(streams))
        )
    times: Times = []
    for output in outputs:
        assert output.success, output.error
        came = accumulate(output.itl, initial=output.start_time + output.ttft)
        times.extend(zip(map(float, output.generated_text.split()), came, strict=True))
    return times


def compare_commands(options: argparse.Namespace) -> None:
    """Both commands on one server."""
    rounds: list[dict[str, dict[str, float]]] = []
    keys = ("output_throughput", "request_throughput", "ttft_ms", "tpot_ms", "e2el_ms")
    print(f"{'round':>5} {'client':>8}", *(f"{key:>18}" for key in keys))
    for number in range(options.rounds):
        for name in CLIENTS[:: 1 if number % 2 else -1]:
            figures = (run_launcher if name == "launcher" else run_bench)(options, number)
            rounds += [{}] if len(rounds) == number else []
            rounds[number][name] = figures
            print(f"{number + 1:5} {name:>8}", *(f"{figures[key]:18.2f}" for key in keys), flush=True)
    ratios = {key: statistics.median(one["launcher"][key] / one["vllm"][key] for one in rounds) for key in keys}
    print(f"{'':5} {'ratio':>8}", *(f"{ratios[key]:18.3f}" for key in keys))
    print(json.dumps({"load_average": os.getloadavg(), "ratios": ratios, "rounds": rounds}))


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
    """The figures of `vllm bench serve`, warmed up with as many requests as are measured."""
    folder = EMBEDDED / options.model
    with tempfile.TemporaryDirectory() as results:
        words = [
            "--backend", "openai", "--base-url", options.url, "--endpoint", "/v1/completions",
            "--model", options.model, "--tokenizer", str(folder if folder.is_dir() else options.model),
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
    """Run a command; where it fails, end with what it said."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT, check=False)
    if ended.returncode:
        sys.exit(f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")


if __name__ == "__main__":
    main()
