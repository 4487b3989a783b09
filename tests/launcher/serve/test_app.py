"""The HTTP side of `launcher.serve` with a fake engine: requests by our own client, and by hand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from launcher.backends.base import Prompt
from launcher.backends.endpoint.dialects import DIALECTS
from launcher.backends.endpoint.questions import Questions
from launcher.backends.endpoint.recognise import check_tokenizer, recognise
from launcher.backends.endpoint.transport.client import Client
from launcher.backends.endpoint.transport.connection import Limits
from launcher.config.schema import ConfigError, SamplingConfig
from launcher.models import EMBEDDED
from launcher.serve.app import Part, Service
from launcher.serve.http import listen, serving
from launcher.version import __version__

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from launcher.serve.requests import Wanted

FOLDER = EMBEDDED / "tiny_llama"
TEXT = "The capital of France is"
IDS = tuple(Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(TEXT).ids)
PROMPT = Prompt(0, TEXT, IDS)
ANSWER = (372, 731, 13, 259, 290, 294, 267, 351, 552, 275, 70, 15, 0)  # "Paris, a city on the river Seine." and EOS


@dataclass
class Canned:
    """An engine that gives every prompt the same answer, one token at a time."""

    failure: str | None = None
    breaks: bool = False
    asked: list[Wanted] = field(default_factory=list)

    def submit(self, wanted: Wanted, deliver: Callable[[Part], None]) -> None:
        self.asked.append(wanted)
        tokens = ANSWER[: wanted.sampling.max_new_tokens]
        for token in tokens[:-1]:
            deliver(Part((token,)))
        if self.breaks:
            deliver(Part(error="out of memory"))
        else:
            deliver(Part(tokens[-1:], "stop" if tokens[-1] == 0 else "length"))


@pytest.fixture
def engine() -> Canned:
    return Canned()


@pytest.fixture
def url(engine: Canned) -> Iterator[str]:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    listening = listen("127.0.0.1", 0)
    with serving(Service(engine, "tiny", tokenizer, 768, 64, "fsdp").app(), listening):
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def within(url: str, do: Callable[[Client], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        async with Client(url, Limits(10, 10)) as client:
            return await do(client)

    return asyncio.run(asyncio.wait_for(go(), 30))


def post(url: str, **body: Any) -> tuple[int | None, Any]:
    async def send(client: Client) -> tuple[int | None, Any]:
        exchange = await client.post("/v1/completions", json.dumps(body).encode())
        return exchange.status, json.loads(exchange.body)

    return within(url, send)


@pytest.mark.parametrize("dialect", ["vllm", "openai"])
def test_a_stream_has_all_tokens(url: str, engine: Canned, dialect: str) -> None:
    sampling = SamplingConfig(max_new_tokens=20)
    answer = within(url, lambda client: Questions(client, DIALECTS[dialect], "tiny", sampling).ask(PROMPT, "salt"))
    assert answer.failure is None
    assert answer.text == " Paris, a city on the river Seine."
    assert answer.token_ids == (ANSWER if dialect == "vllm" else None)
    assert (answer.new_tokens, answer.prompt_tokens, answer.finish_reason) == (len(ANSWER), len(IDS), "stop")
    assert engine.asked[0].token_ids == IDS
    assert (engine.asked[0].sampling.max_new_tokens, engine.asked[0].sampling.temperature) == (20, 0.0)


def test_an_answer_in_one_piece(url: str) -> None:
    status, body = post(url, prompt=TEXT, max_tokens=4, temperature=0, logprobs=None, repetition_penalty=1.0)
    assert status == 200
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" Paris, a", "length")
    assert "token_ids" not in choice
    assert body["usage"] == {"prompt_tokens": len(IDS), "completion_tokens": 4, "total_tokens": len(IDS) + 4}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": TEXT, "n": 2}, "n=2 is not supported"),
        ({"prompt": TEXT, "stop": ["x"]}, "stop=['x'] is not supported"),
        ({"prompt": TEXT, "model": "other"}, "there is no model 'other', only 'tiny'"),
        ({"prompt": TEXT, "max_tokens": 0}, "max_tokens=0 is not a number of 1 or more"),
        ({"prompt": TEXT, "max_tokens": "9"}, "max_tokens='9' is not a number"),
        ({"prompt": TEXT, "temperature": -1}, "temperature=-1 is not a number of 0 or more"),
        ({"prompt": TEXT, "seed": 3}, "seed is not supported"),
        ({"prompt": TEXT, "top_p": 2}, "top_p=2.0 is not above 0 and at most 1"),
        ({"prompt": TEXT, "max_tokens": 99}, "are over 64 of context"),
        ({"prompt": [1, 768]}, "token ids that the model does not have"),
        ({"prompt": ["a", "b"]}, "prompt is neither a text nor a list of token ids"),
        ({"prompt": []}, "the prompt has no tokens"),
        ({}, "prompt is neither"),
    ],
)
def test_what_cannot_be_done_is_refused(url: str, engine: Canned, body: dict[str, Any], words: str) -> None:
    status, answer = post(url, **body)
    assert (status, engine.asked) == (400, [])
    assert words in answer["error"]["message"]


def test_an_engine_that_fails_says_so(url: str, engine: Canned) -> None:
    engine.breaks = True
    assert post(url, prompt=TEXT)[0] == 500
    sampling = SamplingConfig(max_new_tokens=20)
    answer = within(url, lambda client: Questions(client, DIALECTS["vllm"], "tiny", sampling).ask(PROMPT, "salt"))
    assert (answer.failure.kind, answer.failure.message) == ("error", "out of memory")
    engine.failure = "rank 1 has ended"
    status, body = post(url, prompt=TEXT)
    assert (status, body["error"]["message"]) == (503, "rank 1 has ended")


def test_it_is_recognised(url: str) -> None:
    found = within(url, lambda client: recognise(client, "auto", None, "x"))
    assert (found.dialect, found.model) == ("vllm", "tiny")
    assert found.software == f"fsdp, launcher.serve {__version__}"


@pytest.mark.parametrize("ids", [IDS[:-1], (*IDS[:-1], 5)])
def test_another_tokenizer_is_noticed(url: str, ids: tuple[int, ...]) -> None:
    async def check(client: Client) -> None:
        await check_tokenizer(Questions(client, DIALECTS["vllm"], "tiny", SamplingConfig()), Prompt(0, TEXT, ids))

    with pytest.raises(ConfigError, match=f"The server makes {len(IDS)} tokens of prompt 0, and the tokenizer here "):
        within(url, check)


def test_a_port_that_is_taken_is_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"Address already in use\. HINT: --port=0"):
            listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 99999, "--port=99999 is not a port. HINT: --port=0 takes a free one"),
        ("127.0.0.1", -1, "--port=-1 is not a port. HINT: "),
        ("no such host", 0, "--host=no such host is not an address of this machine: "),
        ("192.0.2.77", 0, "Cannot listen on 192.0.2.77:0: "),
    ],
)
def test_an_address_that_is_none_is_one_line(host: str, port: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listen(host, port)
    assert str(caught.value).startswith(words)
