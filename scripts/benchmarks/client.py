"""The delay that the clients of `backend=endpoint` and of `vllm bench serve` add to a server's times, in turns.

    python scripts/benchmarks/client.py [--streams 1,8,64] [--tokens 100] [--rounds 5] [--step-ms 20]

Both call tests/helpers/fake_server.py, whose streams send a token every --step-ms and report when they did. The delay
is the time from then to the arrival time that the client records; the CPU time is that of the client's process. Figures
and ratios are medians over the rounds; the last line is JSON. Requires vLLM.
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
from itertools import accumulate
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ranks import alternating  # noqa: E402

from launcher.backends.base import Prompt  # noqa: E402
from launcher.backends.endpoint.dialects import DIALECTS  # noqa: E402
from launcher.backends.endpoint.load import Load  # noqa: E402
from launcher.backends.endpoint.questions import Questions  # noqa: E402
from launcher.backends.endpoint.transport.client import Client  # noqa: E402
from launcher.backends.endpoint.transport.connection import Exchange, Limits  # noqa: E402
from launcher.config.schema import SamplingConfig  # noqa: E402

FAKE_SERVER = ROOT / "tests" / "helpers" / "fake_server.py"
CLIENTS = ("launcher", "vllm")
PROMPT_IDS = (5, 7, 9, 11)
Times = list[tuple[float, float]]  # for each token: when the server sent it, and when the client says that it arrived


def main() -> None:
    options = parse()
    if options.as_client:
        be_client(options.as_client, options.url)
    else:
        compare_delays(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=lambda text: [int(item) for item in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=100, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--as-client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare_delays(options: argparse.Namespace) -> None:
    """Compare both clients on a server that reports when it sent each token."""
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
                order = alternating(CLIENTS, number)
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
    """The figures of one turn of a client."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{streams} {tokens}\n")
    child.stdin.flush()
    result: dict[str, float] = json.loads(child.stdout.readline())
    return result


def summary(name: str, streams: int, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """A client's medians over the rounds, and the ratios of the launcher's figures over vLLM's."""
    keys = ("p50_us", "mean_us", "p99_us", "cpu_us")
    ratios = {
        key.replace("_us", "_ratio"): statistics.median(one["launcher"][key] / one["vllm"][key] for one in rounds)
        for key in keys
    }
    medians = {key: statistics.median(one[name][key] for one in rounds) for key in keys}
    return {"client": name, "streams": streams, **medians, **ratios}


def be_client(name: str, url: str) -> None:
    """Run as one client: for each line with the numbers of streams and tokens on stdin, print the figures."""
    ask = {"launcher": ask_as_launcher, "vllm": ask_as_vllm}[name]
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
    """The launcher's client, which also records when it sent its last request: the times of an answer are relative to
    it."""

    async def post(self, *arguments: Any) -> Exchange:
        exchange = await super().post(*arguments)
        self.last_sent_at = exchange.sent_at
        return exchange


async def ask_as_launcher(url: str, streams: int, tokens: int) -> Times:
    """Send `streams` requests at once, as `backend=endpoint` does."""
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
    """Send `streams` requests at once, with the function and session settings of `vllm bench serve`."""
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


if __name__ == "__main__":
    main()
