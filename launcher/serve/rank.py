"""One rank of a served engine: `python -m launcher.serve.rank RUN_DIR`. Rank 0 runs the HTTP server."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tokenizers import Tokenizer

from launcher.backends.base import StreamingBackend
from launcher.config.engines import resolve
from launcher.prompts.batches import split
from launcher.rank import guard
from launcher.rank.worker import PARENT, enter_world
from launcher.run_dir.run_dir import RunDir
from launcher.serve.app import Service
from launcher.serve.batches import Batch, Batches, News
from launcher.serve.http import ADDRESS, listen, serving
from launcher.system.terminal import redirected_output
from shards.machine.process_group import from_rank_0
from shards.machine.world import World
from shards.model.config_fields import ConfigFields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from launcher.backends.base import Backend
    from launcher.config.schema import RunConfig
    from launcher.serve.batches import Tokens

SIGN_OF_LIFE_S = 60.0  # after this time without a request rank 0 sends an empty batch to the waiting ranks
LAST_WORDS_S = 1.0
MOST_AT_ONCE = 1024  # prompts per call of an engine with continuous batching
SOCKET = "tokens.sock"  # in the run directory: the other ranks send their tokens to it


def main(folder: str) -> None:
    """Serve until the parent ends this process, the parent itself ends, or the engine fails."""
    run_dir, world = RunDir(Path(folder)), World.from_env(os.environ)
    enter_world(world)
    guard.start(int(os.environ[PARENT]), guard.Watched(lambda reason: False, lambda outcome, is_alone: None))
    with redirected_output(run_dir.rank(world.rank).log):
        try:
            _serve(run_dir, world)
        except BaseException:
            traceback.print_exc()
    os._exit(1)


def _serve(run_dir: RunDir, world: World) -> None:
    run = run_dir.read_run()
    config = run.run_config
    config.model.path = run.model_folder or config.model.path
    backend: Backend = resolve(config.backend.implementation)(config)
    backend.load(run_dir.read_plan(), world, lambda done, total: None)
    answerer = Answerer(backend, config, world)
    address = str(run_dir.path / SOCKET)
    if world.rank > 0:
        backend.barrier()  # wait until rank 0 listens
        with Client(address) as to_first:
            hand_on: Callable[[Sequence[Tokens]], None] = _drop
            if world.rank in run.answering_ranks:
                hand_on = to_first.send
            answerer.run(lambda: from_rank_0(None), hand_on)
    batches = Batches(most_at_once(config, world))
    fields = ConfigFields(run.model_config)
    tokenizer = None
    if run.model_folder and (Path(run.model_folder) / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(f"{run.model_folder}/tokenizer.json")
    service = Service(
        engine=batches,
        model=config.model.name,
        tokenizer=tokenizer,
        vocab_size=fields.size("vocab_size"),
        context=fields.count("max_position_embeddings") or fields.count("n_positions"),
        backend=config.backend.name,
    )
    host, _, port = os.environ[ADDRESS].rpartition(":")
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(host, int(port)))
        stack.enter_context(_tokens_of_others(address, world, backend, batches))
        stack.enter_context(serving(service.app(), listening))
        try:
            answerer.run(lambda: from_rank_0(batches.take(SIGN_OF_LIFE_S)), batches.deliver)
        except BaseException as error:
            lines = str(error).strip().splitlines() or [""]
            batches.fail(f"the engine failed: {type(error).__name__}: {lines[0]}")
            time.sleep(LAST_WORDS_S)  # time for waiting clients to receive the error
            raise


def _drop(news: Sequence[Tokens]) -> None:
    """Ranks that answer together have the same tokens: only those of rank 0 are used."""


def most_at_once(config: RunConfig, world: World) -> int:
    """The number of prompts of one call."""
    if config.is_continuous:
        return MOST_AT_ONCE
    if config.splits_prompts:
        return config.measure.batch_size * world.world_size
    return config.measure.batch_size


@dataclass(frozen=True, slots=True)
class Answerer:
    """The serving loop of a rank."""

    backend: Backend
    config: RunConfig
    world: World

    def run(self, next_batch: Callable[[], Batch], hand_on: Callable[[Sequence[Tokens]], None]) -> NoReturn:
        """Answer batches for ever; `hand_on` receives the tokens of this rank's answers as they are made."""
        while True:
            batch = next_batch()
            if batch.sampling is None:
                continue
            news = News(hand_on)
            if isinstance(self.backend, StreamingBackend):
                self.backend.stream_to(news.on_tokens)
            prompts = split(batch.prompts, self.world, self.config)
            generation = self.backend.generate(prompts, batch.sampling, news)
            news(0, [item for item in generation.completions if item.index not in news.ended])


@contextlib.contextmanager
def _tokens_of_others(address: str, world: World, backend: Backend, batches: Batches) -> Iterator[None]:
    """A context in which the other ranks send the tokens of their answers."""
    if world.world_size == 1:
        yield
        return
    with Listener(address) as door:
        backend.barrier()
        connections = [door.accept() for _ in range(world.world_size - 1)]
        for connection in connections:
            threading.Thread(target=_hand_on, args=(connection, batches), daemon=True).start()
        yield


def _hand_on(connection: Connection, batches: Batches) -> None:
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            batches.deliver(connection.recv())


if __name__ == "__main__":
    main(sys.argv[1])
