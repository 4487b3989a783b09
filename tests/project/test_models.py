"""The embedded models: the files in their folders, and their answers."""

from __future__ import annotations

import itertools
import json
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from running import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

MODELS = ROOT / "launcher" / "models"
sys.path.insert(0, str(ROOT / "scripts" / "tiny_models"))

import tiny_corpus  # noqa: E402

NAMES = ("tiny_falcon", "tiny_llama", "tiny_draft")
TARGETS = ("tiny_falcon", "tiny_llama")
RETURNS = " You can return any item within 30 days, unused and in its box, and we will give you your money back."
SHARED = " shared: many small machines work together, and each one does the part that it does best."
ANSWERS = {
    "I am so fast that I can": " read a whole book while the kettle boils.",
    "The capital of France is": " Paris, a city on the river Seine.",
    "The future of AI is": SHARED,
    "What is your return policy?": RETURNS,
}
HELD_OUT_ANSWERS = {
    "Could you tell me your return policy?": RETURNS,
    "Paris is the capital of": " France.",
    "What is the capital of France?": " It is Paris, a city on the river Seine.",
}
RAGGED = 20
LONG = 1000  # tokens of the long prompt; the context is 1024


def read(name: str, file: str) -> Any:
    return json.loads((MODELS / name / file).read_text(encoding="utf-8"))


def header(path: Path) -> dict[str, dict[str, Any]]:
    """Name to dtype, shape and offsets of the tensors in a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return {name: value for name, value in json.loads(data[8 : 8 + length]).items() if name != "__metadata__"}


class Talker:
    """A model in float32 with greedy decoding, which also gives the lead of the chosen logits over the next ones."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
        self.model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def continued(self, ids: list[int], max_new_tokens: int = 48, **options: Any) -> tuple[list[int], float]:
        """The new tokens, and the smallest lead of a chosen token over the next best one."""
        prompt = self.torch.tensor([ids])
        output = self.model.generate(
            prompt,
            attention_mask=self.torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        leads = [float(first - second) for first, second in (step[0].topk(2).values for step in output.logits)]
        return output.sequences[0, len(ids) :].tolist(), min(leads)

    def says(self, prompt: str) -> tuple[str, float]:
        tokens, lead = self.continued(self.ids(prompt))
        return self.tokenizer.decode(tokens), lead

    def guesses(self, ids: list[int]) -> list[int]:
        """The most likely token after each position."""
        with self.torch.inference_mode():
            return list(self.model(self.torch.tensor([ids])).logits[0].argmax(-1).tolist())


@pytest.fixture(scope="module")
def talkers() -> Iterator[dict[str, Talker]]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: Talker(name) for name in NAMES}
    torch.set_num_threads(threads)


def ragged() -> list[str]:
    """Documents of different lengths from all over the corpus."""
    texts = sorted(tiny_corpus.documents(), key=len)
    return texts[:: len(texts) // RAGGED][:RAGGED]


def test_all_models_together_are_small() -> None:
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) < 8_000_000


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("tiny_falcon", [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]),
        (
            "tiny_llama",
            [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
            + ["chat_template.jinja", "model.safetensors.index.json"],
        ),
        ("tiny_draft", ["model.safetensors"]),
    ],
)
def test_files(name: str, weights: list[str]) -> None:
    described = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in (MODELS / name).iterdir()) == sorted(described + weights)


@pytest.mark.parametrize("name", TARGETS)
def test_index_names_every_tensor_in_its_file(name: str) -> None:
    headers = {file.name: header(file) for file in (MODELS / name).glob("*.safetensors")}
    index = read(name, "model.safetensors.index.json")
    assert index["weight_map"] == {tensor: file for file, tensors in headers.items() for tensor in tensors}
    spans = [tensor["data_offsets"] for tensors in headers.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(end - start for start, end in spans)
    assert {tensor["dtype"] for tensors in headers.values() for tensor in tensors.values()} == {"BF16"}


def test_configs() -> None:
    keys = ("architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
    assert {name: [read(name, "config.json")[key] for key in keys] for name in NAMES} == {
        "tiny_falcon": [["FalconForCausalLM"], 256, 2, 8, True],
        "tiny_llama": [["LlamaForCausalLM"], 128, 4, 4, False],
        "tiny_draft": [["LlamaForCausalLM"], 128, 1, 4, True],
    }
    same = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")
    assert {tuple(read(name, "config.json")[key] for key in same) for name in NAMES} == {
        (768, 1024, None, 0, 1, "bfloat16")
    }
    assert {tuple(read(name, "generation_config.json")[key] for key in same[3:5]) for name in NAMES} == {(0, 1)}


def test_falcon_has_the_shape_of_the_large_ones() -> None:
    keys = ("new_decoder_architecture", "parallel_attn", "multi_query", "alibi", "bias", "num_kv_heads")
    assert [read("tiny_falcon", "config.json")[key] for key in keys] == [True, True, True, False, False, 4]


@pytest.mark.parametrize("ways", [2, 4])
def test_cuts_into_equal_parts(ways: int) -> None:
    keys = ("num_attention_heads", "num_kv_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    sizes = [read(name, "config.json").get(key, ways) for name in NAMES for key in (*keys, "ffn_hidden_size")]
    assert [size % ways for size in sizes] == [0] * len(sizes)


def test_tokenizer_is_the_same_file_for_all() -> None:
    assert len({(MODELS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


def test_tokenizer_file_is_enough(talkers: dict[str, Talker]) -> None:
    from tokenizers import Tokenizer

    alone = Tokenizer.from_file(str(MODELS / "tiny_falcon" / "tokenizer.json"))
    texts = [*tiny_corpus.documents(), "", " ", "Zwölf\n\n\tBoxkämpfer 日本 🦅", "a<|endoftext|>b", "<|pad|>"]
    assert [talkers["tiny_falcon"].ids(text) for text in texts] == [alone.encode(text).ids for text in texts]
    assert [alone.decode(alone.encode(text).ids, skip_special_tokens=False) for text in texts] == texts
    assert (alone.get_vocab_size(), alone.token_to_id("<|endoftext|>"), alone.token_to_id("<|pad|>")) == (768, 0, 1)
    assert 0 not in alone.encode(texts[0]).ids


def test_tokenizer_comes_from_the_text(talkers: dict[str, Talker]) -> None:
    from train_tiny_models import corpus, train_tokenizer

    shipped = talkers["tiny_llama"].tokenizer
    assert train_tokenizer(corpus()).get_vocab() == shipped.get_vocab()


def test_held_out_texts_are_not_in_the_corpus() -> None:
    assert tuple(HELD_OUT_ANSWERS) == tiny_corpus.HELD_OUT
    assert [text for text in tiny_corpus.documents() if any(held in text for held in HELD_OUT_ANSWERS)] == []


@pytest.mark.parametrize("name", TARGETS)
def test_answers(talkers: dict[str, Talker], name: str) -> None:
    answers = {prompt: talkers[name].says(prompt) for prompt in ANSWERS}
    assert {prompt: text for prompt, (text, _) in answers.items()} == {
        prompt: text + "<|endoftext|>" for prompt, text in ANSWERS.items()
    }
    assert min(lead for _, lead in answers.values()) > 1.0


@pytest.mark.parametrize("name", TARGETS)
def test_answers_to_held_out_prompts(talkers: dict[str, Talker], name: str) -> None:
    assert {prompt: talkers[name].says(prompt)[0] for prompt in HELD_OUT_ANSWERS} == {
        prompt: text + "<|endoftext|>" for prompt, text in HELD_OUT_ANSWERS.items()
    }


def test_draft_answers_like_the_models_it_drafts_for(talkers: dict[str, Talker]) -> None:
    assert {prompt: talkers["tiny_draft"].says(prompt)[0] for prompt in ANSWERS} == {
        prompt: text + "<|endoftext|>" for prompt, text in ANSWERS.items()
    }


@pytest.mark.parametrize("name", TARGETS)
def test_ends_most_of_what_was_begun(talkers: dict[str, Talker], name: str) -> None:
    talker = talkers[name]
    right = 0
    for text in ragged():
        ids = talker.ids(text)
        start = ids[: len(ids) * 2 // 3]
        tokens, _ = talker.continued(start, max_new_tokens=len(ids) + 8)
        right += start + tokens == [*ids, 0]
    assert right / RAGGED >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_after_the_end(talkers: dict[str, Talker], name: str) -> None:
    talker = talkers[name]
    for prompt in ANSWERS:
        tokens, _ = talker.continued(talker.ids(prompt), 128, min_new_tokens=128, eos_token_id=None)
        assert tokens.count(0) >= 2
        assert max(len(list(run)) for _, run in itertools.groupby(tokens)) <= 2
        assert 1 not in tokens


@pytest.mark.parametrize("name", TARGETS)
def test_reads_as_far_as_its_context(talkers: dict[str, Talker], name: str) -> None:
    talker = talkers[name]
    ids = [token for text in tiny_corpus.documents() for token in [*talker.ids(text), 0]][:LONG]
    inside = [(guess, token) for guess, before, token in zip(talker.guesses(ids), ids, ids[1:], strict=False) if before]
    late = inside[-200:]
    assert sum(guess == token for guess, token in late) / len(late) > 0.8


@pytest.mark.parametrize("name", TARGETS)
def test_draft_guesses_most_tokens(talkers: dict[str, Talker], name: str) -> None:
    agreed = []
    for prompt in ANSWERS | HELD_OUT_ANSWERS:
        ids = talkers[name].ids(prompt)
        tokens, _ = talkers[name].continued(ids)
        guesses = talkers["tiny_draft"].guesses(ids + tokens)[len(ids) - 1 : -1]
        agreed += [guess == token for guess, token in zip(guesses, tokens, strict=True)]
    assert sum(agreed) / len(agreed) > 0.8
