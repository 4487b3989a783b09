"""Chats by a model's template as in transformers, prompts with a shared beginning, and the line about lengths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from launcher.backends.base import Prompt
from launcher.composition.compose import compose_run
from launcher.config.schema import ConfigError
from launcher.models import EMBEDDED
from launcher.prompts.chat import chats
from launcher.prompts.prompts import load_prompts, synthetic_prompts
from launcher.report.run.lengths import histogram, lengths_line

TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" and message.content == "no" %}
        {{- raise_exception("no system role") }}
    {%- endif %}
    {%- if message.content is none %}{% continue %}{% endif %}
<|{{ message.role }}|>{{ message.content | trim }}{{ [message.role] | tojson }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the tokenizer of tiny_llama and a chat template that uses the common features of templates."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(EMBEDDED / "tiny_llama" / name, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("system", [None, "You are kind."])
def test_chats_are_those_of_transformers(folder: Path, system: str | None) -> None:
    texts = ["The capital of France is ", "\u00fcber\n"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = [] if system is None else [{"role": "system", "content": system}]
    turns = [[*before, {"role": "user", "content": text}] for text in texts]
    expected = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    assert chats(texts, system, folder) == expected
    words = ["prompts=file", "prompts.path=prompts.txt", "prompts.chat=true"]
    config = compose_run(words if system is None else [*words, f"prompts.system='{system}'"])
    config.prompts.path, config.prompts.texts = None, texts
    ids = [tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns]
    assert [list(prompt.token_ids) for prompt in load_prompts(config, folder, 768)] == ids


def test_the_template_of_a_file_goes_first(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}: {{ messages[0].content }}")
    assert chats(["a"], None, folder) == ["2026-01-01: a"]
    assert chats(["a", "b"], "be kind", EMBEDDED / "tiny_llama") == ["be kind\na\n", "be kind\nb\n"]


def test_what_makes_no_chat_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tiny_falcon has no chat template. HINT: prompts.chat=false"):
        chats(["a"], None, EMBEDDED / "tiny_falcon")
    with pytest.raises(ConfigError, match=r"refuses: no system role. HINT: prompts.system=null"):
        chats(["a"], "no", folder)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"refuses: .*HINT: prompts.chat=false"):
        chats(["a"], None, folder)
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ConfigError, match=r"refuses: "):
        chats(["a"], None, folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompts.system=x"], "prompts.system= is only used with prompts.chat=true. HINT: prompts.chat=true"),
        (["prompts=synthetic", "prompts.chat=true"], "are random tokens, not texts. HINT: prompts.chat=false"),
        (["prompts.shared_tokens=3"], "HINT: prompts=synthetic prompts.shared_tokens=3"),
        (["prompts=synthetic", "prompts.shared_tokens=65"], "HINT: prompts.shared_tokens=64"),
    ],
)
def test_what_a_set_does_not_read_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        compose_run(words)


def test_prompts_that_share_their_beginning() -> None:
    prompts = [prompt.token_ids for prompt in synthetic_prompts(20, 12, 500, seed=3, shared=8)]
    assert {len(ids) for ids in prompts} == {12}
    assert len({ids[:8] for ids in prompts}) == 1
    assert len({ids[8:] for ids in prompts}) == 20
    config = compose_run(["prompts=synthetic", "prompts.shared_tokens=8", "prompts.input_tokens=12"])
    assert len({prompt.token_ids[:8] for prompt in load_prompts(config, None, 500)}) == 1


def test_lengths_in_a_line() -> None:
    prompts = [Prompt(index, "", (0,) * length) for index, length in enumerate((5, 5, 5, 5, 6, 8))]
    assert lengths_line(prompts) == "prompts: 6 of 5 to 8 tokens, median 5, 34 together  5 █▂ ▂ 8"
    assert lengths_line(prompts[:2]) == "prompts: 2 of 5 tokens, 10 together"
    assert len(histogram([1, 1000])) == 16
