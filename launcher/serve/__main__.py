"""`python -m launcher.serve [overrides] [--host=H] [--port=P]`: an engine behind OpenAI's completions API.

    python -m launcher.serve backend=fsdp devices=2 model=tiny_llama --port=8000
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "The capital of France is"}'

It answers one batch at a time: requests that arrive meanwhile wait. Runs until Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

from launcher.composition.compose import command_of, compose_run
from launcher.config.engines import example_with
from launcher.config.schema import ConfigError
from launcher.launch.ranks import handled_signals, started_ranks, worker_command
from launcher.prepare.prepare import prepare
from launcher.run_dir.lifecycle import create_run_dir
from launcher.serve.http import ADDRESS, listen
from launcher.system.terminal import Parser, run_command
from shards.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from launcher.run_dir.run_dir import RunDir

START_POLL_S, READY_POLL_S = 0.2, 1.0
LAST_LINES = 15


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(prog="python -m launcher.serve", description="Serve an engine over HTTP until Ctrl-C.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for python -m launcher")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for everybody who can reach this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("--config-dir", action="append", default=[], metavar="FOLDER")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 after an interrupt, 1 if the engine fails, 2 for a mistake that the user can fix, explained on
    stderr."""
    try:
        arguments = parse(argv)
        config = compose_run(arguments.overrides, tuple(arguments.config_dir))
        if config.backend.starts_servers or config.launch.name != "local":
            setting = f"launch={config.launch.name}"
            if config.backend.starts_servers:
                setting = f"backend={config.backend.name}"
            hint = f"{example_with('has_slots')} launch=local"
            raise ConfigError(f"{setting}: only an engine on this machine is served.", hint)
        run = prepare(config, command_of(arguments.overrides, arguments.config_dir))
        with listen(arguments.host, arguments.port) as probe:
            port: int = probe.getsockname()[1]
        with tempfile.TemporaryDirectory(prefix="launcher_serve_") as folder:
            run_dir = create_run_dir(replace(run, config=replace(run.config, output_dir=folder)))
            return _serve(run_dir, arguments.host, port)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _serve(run_dir: RunDir, host: str, port: int) -> int:
    """Start the ranks, report when they answer, and wait for their end or for a signal; then clean up."""
    run = run_dir.read_run()
    command = worker_command("launcher.serve.rank", str(run_dir), run.world_size, run.run_config.backend.python)
    poll_s = START_POLL_S
    with handled_signals(run_dir, run) as signals:
        try:
            with started_ranks(run_dir, run, command, {ADDRESS: f"{host}:{port}"}, signals) as ranks:
                process = ranks.process
                while process.poll() is None:
                    ranks.look_at_memory()
                    if poll_s == START_POLL_S and _answers(host, port):
                        poll_s = READY_POLL_S
                        address = f"http://{host}:{port}"
                        print(json.dumps({"url": address, "model": run.run_config.model.name}), flush=True)
                    time.sleep(poll_s)
        except KeyboardInterrupt:
            return 0
    print(f"The engine has ended with exit code {process.returncode}; the last output of its ranks:", file=sys.stderr)
    for rank in range(run.world_size):
        print(f"rank {rank}:", *run_dir.rank(rank).log_end().splitlines()[-LAST_LINES:], sep="\n  ", file=sys.stderr)
    return 1


def _answers(host: str, port: int) -> bool:
    if host == "0.0.0.0":
        host = "127.0.0.1"
    try:
        with urlopen(f"http://{host}:{port}/health", timeout=5):
            return True
    except (URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(run_command(main))
