"""The endpoint client with a server that misbehaves in many ways: the correct outcome, and no hangs."""

from __future__ import annotations

import asyncio
import select
import socket
import subprocess
from dataclasses import replace
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

import pytest
from fake_server import FakeServer

from launcher.backends.base import Prompt
from launcher.backends.endpoint.dialects import DIALECTS
from launcher.backends.endpoint.load import Load
from launcher.backends.endpoint.questions import Questions, ServerGoneError
from launcher.backends.endpoint.transport.arrivals import ArrivalClock
from launcher.backends.endpoint.transport.client import Client
from launcher.backends.endpoint.transport.connection import Limits
from launcher.backends.endpoint.transport.events import events
from launcher.config.schema import SamplingConfig
from launcher.prompts.arrivals import poisson_arrivals

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from launcher.backends.endpoint.answers import Answer

KEY = "sk-very-secret"
LIMITS = Limits(timeout_s=60.0, stall_s=60.0)
PROMPTS = [Prompt(index, f"text {index}", (5, index)) for index in range(200)]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def ask(url: str, count: int = 1, new_tokens: int = 8, limits: Limits = LIMITS, **options: object) -> list[Answer]:
    """The answers to the first `count` prompts, all sent at once."""

    async def go() -> list[Answer]:
        async with Client(url, limits, KEY) as client:
            questions = Questions(client, DIALECTS["vllm"], "fake", SamplingConfig(max_new_tokens=new_tokens))
            questions = replace(questions, **options)
            return await asyncio.gather(*(questions.ask(prompt, "salt") for prompt in PROMPTS[:count]))

    return asyncio.run(asyncio.wait_for(go(), 100))


def test_an_answer(server: FakeServer) -> None:
    (answer,) = ask(server.url("ok"))
    assert (answer.token_ids, answer.text) == (tuple(range(1, 9)), " 1 2 3 4 5 6 7 8")
    assert (answer.finish_reason, answer.new_tokens, answer.prompt_tokens, answer.failure) == ("length", 8, 2, None)
    assert len(answer.pieces_s) == 8
    assert all(earlier <= later for earlier, later in pairwise(answer.pieces_s))


def test_several_tokens_in_one_event_are_all_counted(server: FakeServer) -> None:
    (answer,) = ask(server.url("two_at_once"), new_tokens=7)
    assert (answer.token_ids, answer.new_tokens, len(answer.pieces_s)) == (tuple(range(1, 8)), 7, 4)
    assert answer.failure is None


def test_what_the_server_read_is_kept(server: FakeServer) -> None:
    (answer,) = ask(server.url("other_prompt"))
    assert answer.prompt_tokens == 3


@pytest.mark.parametrize(
    ("behaviour", "kind", "tokens"),
    [
        ("drop_token", "tokens_lost", 7),
        ("one_more", "too_many_tokens", 9),
        ("error_under_200", "error", 1),
        ("aborts", "aborted", 1),
        ("stalls", "stalled", 1),
        ("mute", "stalled", 0),
        ("pings", "timeout", 0),
        ("closes", "closed", 1),
        ("closes_at_once", "closed", 0),
        ("no_done", "incomplete", 8),
        ("no_end", "incomplete", 8),
        ("empty", "incomplete", 0),
        ("half_an_event", "malformed", 0),
        ("wrong_types", "malformed", 0),
        ("a_list", "malformed", 0),
        ("busy", "http_429", 0),
        ("breaks", "http_500", 0),
        ("redirects", "http_307", 0),
        ("junk", "too_large", 0),
        ("no_http", "not_http", 0),
        ("never_ends", "too_large", None),
    ],
)
def test_a_lie_has_its_name(server: FakeServer, behaviour: str, kind: str, tokens: int | None) -> None:
    limits = {"stalled": Limits(60.0, 0.3), "timeout": Limits(0.3, 60.0)}.get(kind, LIMITS)
    for answer in ask(server.url(behaviour), count=2, limits=limits):
        assert answer.failure is not None
        assert answer.failure.kind == kind, answer.failure
        assert tokens is None or answer.new_tokens == tokens
        assert "\n" not in answer.failure.message
        assert len(answer.failure.message) <= 300
        assert KEY not in answer.failure.message
    assert server.seen[-1].headers["authorization"] == f"Bearer {KEY}"


def test_a_server_that_is_not_there_is_no_failed_request(server: FakeServer) -> None:
    with FakeServer() as other:
        port = other.port
    with pytest.raises(ServerGoneError, match=f"127.0.0.1:{port}"):
        ask(f"http://127.0.0.1:{port}")


def test_requests_are_sent_again_only_where_that_is_wanted(server: FakeServer) -> None:
    (once,) = ask(server.url("busy_once"), new_tokens=5)
    assert once.failure is not None
    (again,) = ask(server.url("busy_once"), new_tokens=6, retries=2)
    assert (again.failure, again.attempts, again.new_tokens) == (None, 2, 6)
    assert again.pieces_s[0] > 0.5, "the wait counts"


def test_connections_are_kept(server: FakeServer) -> None:
    before = server.connections

    async def go() -> None:
        async with Client(server.url("ok"), LIMITS) as client:
            questions = Questions(client, DIALECTS["vllm"], "fake", SamplingConfig(max_new_tokens=2))
            for prompt in PROMPTS[:5]:
                assert (await questions.ask(prompt, "salt")).failure is None

    asyncio.run(go())
    assert server.connections == before + 1


def certificate(folder: Path) -> tuple[str, str]:
    """A self-signed certificate of this machine, and its key."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    paths = str(folder / "certificate.pem"), str(folder / "key.pem")
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", paths[0], "-keyout", paths[1]]
    subprocess.run([*command, *names], check=True, capture_output=True, timeout=60)
    return paths


def test_certificates_are_verified(tmp_path: Path) -> None:
    paths = certificate(tmp_path)

    async def go(url: str, ca_file: str | None) -> Answer:
        async with Client(url, LIMITS, ca_file=ca_file) as client:
            questions = Questions(client, DIALECTS["vllm"], "fake", SamplingConfig(max_new_tokens=2))
            return await questions.ask(PROMPTS[0], "salt")

    with FakeServer(certificate=paths) as server:
        trusted = asyncio.run(go(server.url("ok"), paths[0]))
        stranger = asyncio.run(go(server.url("ok"), None))
    assert trusted.failure is None
    assert stranger.failure is not None
    assert (stranger.failure.kind, "certificate" in stranger.failure.message.lower()) == ("unreachable", True)


def drive(server: FakeServer, behaviour: str, **how: object) -> tuple[list[int], Load[Prompt]]:
    """Send prompts by a `Load`; returns their indices in the order of the answers, and the `Load`."""
    done: list[int] = []

    async def go() -> Load[Prompt]:
        async with Client(server.url(behaviour), LIMITS) as client:
            questions = Questions(client, DIALECTS["vllm"], "fake", SamplingConfig(max_new_tokens=4))

            async def send(prompt: Prompt) -> None:
                answer = await questions.ask(prompt, "salt")
                assert answer.failure is None, answer.failure
                done.append(prompt.index)

            load = Load(send, **how)
            await load.run(PROMPTS)
            return load

    return done, asyncio.run(asyncio.wait_for(go(), 100))


@pytest.mark.parametrize("concurrency", [1, 8, None])
def test_a_closed_loop_keeps_its_number_of_requests_open(concurrency: int | None) -> None:
    open_at_once = concurrency or len(PROMPTS)
    with FakeServer(wait_for=open_at_once) as server:
        done, load = drive(server, "together", concurrency=concurrency)
    assert sorted(done) == list(range(len(PROMPTS)))
    assert server.most_open == open_at_once
    assert 0 < load.cost.cpu_s <= load.cost.wall_s
    assert load.cost.loop_lag_s


def test_an_open_loop_waits_for_no_answer() -> None:
    with FakeServer(wait_for=len(PROMPTS)) as server:
        done, load = drive(server, "together", arrivals=[0.0] * len(PROMPTS))
    assert sorted(done) == list(range(len(PROMPTS)))
    assert len(load.cost.send_lag_s) == len(PROMPTS)


def test_what_goes_wrong_in_one_ends_all(server: FakeServer) -> None:
    async def fail(prompt: Prompt) -> None:
        if prompt.index == 3:
            raise ServerGoneError("gone")
        await asyncio.sleep(20)

    with pytest.raises(ServerGoneError, match="gone"):
        asyncio.run(asyncio.wait_for(Load(fail).run(PROMPTS), 10))


def test_arrivals_are_those_of_the_seed() -> None:
    moments = poisson_arrivals(10_000, 50.0, seed=7)
    assert moments == poisson_arrivals(10_000, 50.0, seed=7)
    assert moments != poisson_arrivals(10_000, 50.0, seed=8)
    gaps = sorted(later - earlier for earlier, later in pairwise(moments))
    assert moments[-1] == pytest.approx(200, rel=0.05)
    assert gaps[len(gaps) // 2] == pytest.approx(0.6931 / 50, rel=0.05), "the median of an exponential"


def test_bytes_have_the_moment_of_their_arrival_not_of_their_reading() -> None:
    """After retries for some milliseconds: Linux starts to time-stamp packets shortly after the first socket asks for
    it."""
    deadline = perf_counter() + 10
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    with ours, theirs:
        while True:
            clock = ArrivalClock(ours)
            theirs.sendall(b"token")
            select.select([ours], [], [], 10)
            arrived = perf_counter()
            while perf_counter() < arrived + 0.05:
                pass
            moment, data = clock.receive()
            if moment <= arrived:
                break
            assert perf_counter() < deadline, "never stamped"
    assert data == b"token"
    assert clock.earliest == moment


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_events_are_the_same_however_they_are_cut(size: int) -> None:
    stream = b": hello\r\n\r\ndata: one\r\n\r\nevent: x\ndata:two\ndata: lines\n\nid: 4\n\ndata: half"
    cut = [(float(start), stream[start : start + size]) for start in range(0, len(stream), size)]
    found = list(events(cut))
    assert [data for _, data in found] == [b"one", b"two\nlines"]
    ends = [stream.index(b"one\r\n\r\n") + 6, stream.index(b"lines\n\n") + 6]
    assert [moment for moment, _ in found] == [end - end % size for end in ends], "when the last byte came"
