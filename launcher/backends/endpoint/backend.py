"""The engine that calls a server: the client's event loop runs in its own thread and delivers the answers as they
arrive."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.backends.base import DeviceMemory, Generation
from launcher.backends.endpoint.dialects import DIALECTS
from launcher.backends.endpoint.load import Load
from launcher.backends.endpoint.questions import Questions, ServerGoneError
from launcher.backends.endpoint.recognise import Server, check_tokenizer, recognise
from launcher.backends.endpoint.results import completions_of, failures_of, server_repeat
from launcher.backends.endpoint.server_metrics import between, samples
from launcher.backends.endpoint.started import StartedServer, free_port
from launcher.backends.endpoint.transport.client import Client
from launcher.backends.endpoint.transport.connection import Limits
from launcher.config.schema import Accelerator, ConfigError
from launcher.prompts.arrivals import arrivals_of
from launcher.run_dir.run_dir import RunDir
from shards.machine import nvml
from shards.machine.cards import cuda_devices

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from concurrent.futures import Future

    from launcher.backends.base import OnStep, Prompt
    from launcher.backends.endpoint.answers import Answer
    from launcher.backends.endpoint.engine import EndpointConfig
    from launcher.backends.endpoint.load import ClientCost
    from launcher.config.schema import RunConfig, SamplingConfig
    from shards.machine.world import World
    from shards.plan.plan import Plan

Result = TypeVar("Result")

LOOK_S = 0.2  # seconds between two polls for new answers
READY_S = 0.5  # seconds between two attempts to reach a starting server
OF_AN_ENGINE = ("parameter_bytes", "kv_cache_bytes", "kv_cache_reserved_bytes", "tensor_bytes", "peak_allocated_bytes")
UNKNOWN = "a server does not tell"
SWITCH_S = 0.0005  # seconds that the client's thread waits for the interpreter lock; Python's default is 5 ms


class EndpointBackend:
    """The server at `backend.url`, or a server that is started as a child of this process and ended with it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options: EndpointConfig = config.backend  # type: ignore[assignment]
        self.started: StartedServer | None = None
        self.client = Client("http://127.0.0.1", Limits())
        self.has_checked_tokenizer = False
        sys.setswitchinterval(SWITCH_S)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name="client").start()

    def load(self, plan: Plan | None, world: World, progress: Callable[[int, int], None]) -> None:
        url = self.options.url
        if url is None:
            port, mark = free_port(), f"launcher_{uuid.uuid4().hex[:12]}"
            on_cuda = self.config.accelerator is Accelerator.cuda
            command = self.options.command(self.config, str(port), mark, on_cuda)
            folder = Path(self.config.run_dir or tempfile.mkdtemp(prefix="launcher_server_"))
            self.started = StartedServer(command, RunDir(folder).rank(0).server_log)
            self.started.start()
            url = f"http://127.0.0.1:{port}"
        limits, key = Limits(self.options.request_timeout_s, self.options.stall_timeout_s), None
        if self.options.key_variable:
            key = os.environ[self.options.key_variable]
        self.client = Client(url, limits, key, self.options.ca_file)
        try:
            self.server = self._wait_until_ready(progress)
        except BaseException:
            self.close()
            raise
        progress(1, 1)

    def _wait_until_ready(self, progress: Callable[[int, int], None]) -> Server:
        """Wait until the server has completed a prompt; ConfigError if it does not."""
        served = self.options.served_model
        asked = self.options.dialect_of(self.config), served, self.config.model.path
        ready_s = self.config.server.ready_timeout_s
        deadline = time.monotonic() + ready_s
        while True:
            try:
                return self._run(recognise(self.client, *asked))
            except ServerGoneError as error:
                if self.started is None:
                    fact = f"Nobody answers at {self.client.url}: {error}."
                    raise ConfigError(fact, "start it there, or in the run: backend.url=null server=vllm") from None
            except ConfigError as error:
                if self.started is None:
                    raise
                if time.monotonic() > deadline:
                    fact = f"The server was not ready in {ready_s:g} s: {error.fact}"
                    raise ConfigError(fact, f"server.ready_timeout_s={2 * ready_s:g}") from None
            self.started.check()
            progress(0, 1)
            time.sleep(READY_S)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        """Send all prompts, in the order of the set and as `load` configures. An error ends a server that was
        started."""
        try:
            ordered = sorted(prompts, key=lambda prompt: prompt.index)
            dialect, options = DIALECTS[self.server.dialect], self.options
            questions = Questions(
                self.client, dialect, self.server.model, sampling, self.config.seed, options.retries, options.extra
            )
            textless = next((prompt for prompt in ordered if not prompt.text), None)
            if textless is not None and not questions.dialect.takes_ids:
                fact = f"Prompt {textless.index} is token ids only, and dialect={self.server.dialect} takes text."
                raise ConfigError(fact, "prompts=file prompts.path=questions.txt")
            if not self.has_checked_tokenizer and questions.dialect.takes_ids and ordered and textless is None:
                self._run(check_tokenizer(questions, ordered[0]))
            self.has_checked_tokenizer = True
            salt = uuid.uuid4().hex  # a repeat must not find the prompts of an earlier one in the server's cache
            new: queue.SimpleQueue[tuple[Prompt, Answer]] = queue.SimpleQueue()

            async def send(prompt: Prompt) -> None:
                new.put((prompt, await questions.ask(prompt, salt)))

            load = Load(send, self.config.load.concurrency, arrivals_of(self.config, ordered))
            before = self._samples()
            answered = self._follow(asyncio.run_coroutine_threadsafe(load.run(ordered), self.loop), new, on_step)
            own_metrics = between(before, self._samples())
            failures = failures_of(answered)
            if ordered and len(failures) == len(ordered):
                first = failures[0]
                raise RuntimeError(f"all {len(failures)} requests failed, the first by {first.kind}: {first.message}")
            return Generation(
                completions_of(answered, dialect.gives_ids),
                decode_steps=0,  # a server does not report its steps
                failures=failures,
                server=server_repeat(answered, self.server, dialect.gives_ids, load.cost, own_metrics),
                wall_s=load.cost.wall_s,
            )
        except BaseException:
            self.close()
            raise

    def _follow(
        self, running: Future[ClientCost], new: queue.SimpleQueue[tuple[Prompt, Answer]], on_step: OnStep
    ) -> list[tuple[Prompt, Answer]]:
        """All answers of a load, reported as they arrive, including those before an error."""
        gives_ids = DIALECTS[self.server.dialect].gives_ids
        answered: list[tuple[Prompt, Answer]] = []
        try:
            while not running.done():
                wait([running], LOOK_S)
                came = [new.get() for _ in range(new.qsize())]
                answered += came
                on_step(sum(answer.new_tokens for _, answer in came), completions_of(came, gives_ids))
                if self.started is not None:
                    self.started.check()
            running.result()
        except ServerGoneError as error:
            if self.started is not None:
                self.started.check()
            raise RuntimeError(str(error)) from error
        finally:
            running.cancel()
        answered += [new.get() for _ in range(new.qsize())]
        return answered

    def _samples(self) -> dict[str, float]:
        """The server's own metrics, if it publishes them."""
        exchange = self._run(self.client.get("/metrics"))
        if exchange.failure is not None:
            return {}
        return samples(exchange.body)

    def _run(self, do: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the client's loop."""
        return asyncio.run_coroutine_threadsafe(do, self.loop).result()

    def barrier(self) -> None:
        """Does nothing: there is one client."""

    def memory(self) -> list[DeviceMemory]:
        """Device memory of the processes of a server that was started; empty for any other server."""
        if self.started is None:
            return []
        anonymous = self.started.anonymous_bytes()
        if self.config.accelerator is not Accelerator.cuda:
            return [
                DeviceMemory(0, "cpu", host_anonymous_bytes=anonymous, reasons=dict.fromkeys(OF_AN_ENGINE, UNKNOWN))
            ]
        pids = set(self.started.pids())
        devices: list[DeviceMemory] = []
        for rank, card in enumerate(cuda_devices(os.environ)[: self.config.devices]):
            assert card.uuid is not None
            reasons = dict.fromkeys(OF_AN_ENGINE, UNKNOWN)
            on_card: list[int | None] = []
            try:
                on_card = [process.memory_bytes for process in nvml.processes(card.uuid) if process.pid in pids]
            except nvml.NvmlError as error:
                reasons["nvml_used_bytes"] = f"NVML: {error}"
            memory = DeviceMemory(rank, f"cuda:{rank}", device_name=card.name, device_uuid=card.uuid, reasons=reasons)
            known = [size for size in on_card if size is not None]
            if known:
                memory = replace(memory, nvml_used_bytes=sum(known))
            else:
                hidden = "NVML does not show the server's processes (another PID namespace?)"
                reasons.setdefault("nvml_used_bytes", hidden)
            devices.append(memory)
        if devices:
            devices[0] = replace(devices[0], host_anonymous_bytes=anonymous)
        return devices

    def close(self) -> None:
        """Close the connections, and end the server if this process started it."""
        self._run(self.client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        if self.started is not None:
            self.started.close()
