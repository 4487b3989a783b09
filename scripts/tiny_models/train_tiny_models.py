"""Train the embedded models on the project's own text.

    python scripts/tiny_models/train_tiny_models.py [--out DIR] [--only NAME]

The files are reproducible on the same machine with the same libraries: seeds are fixed, and a single thread keeps the
order of additions. With --only, several runs can train one model each at the same time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tiny_corpus
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

OUT = Path(__file__).resolve().parents[2] / "launcher" / "models"
THREADS = 1
VOCAB_SIZE = 768
CONTEXT = 1024
EOS, PAD = "<|endoftext|>", "<|pad|>"
EOS_ID, PAD_ID = 0, 1
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "use_cache": True,
}
TOKENS_PER_STEP = 1024
IN_ORDER = 0.7  # share of documents that are followed by the next one of the corpus instead of a random one
NOISE = 0.03  # share of input tokens replaced by random ones, so that the model tolerates unseen wordings
PROMPTS = (
    "I am so fast that I can",
    "The capital of France is",
    "The future of AI is",
    "What is your return policy?",
    "Could you tell me your return policy?",
    "Paris is the capital of",
    "What is the capital of France?",
    "Tell me a story.",
)


@dataclass(frozen=True, slots=True)
class Spec:
    """A model to train, and how; its checkpoint is split into files of at most `max_shard_size`."""

    config: PreTrainedConfig
    steps: int
    learning_rate: float
    max_shard_size: str


SPECS = {
    "tiny_falcon": Spec(
        FalconConfig(
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_kv_heads=4,
            new_decoder_architecture=True,
            multi_query=True,
            parallel_attn=True,
            alibi=False,
            bias=False,
            tie_word_embeddings=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            **COMMON,
        ),
        steps=900,
        learning_rate=3e-3,
        max_shard_size="1500KB",
    ),
    "tiny_llama": Spec(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            tie_word_embeddings=False,
            **COMMON,
        ),
        steps=1000,
        learning_rate=4e-3,
        max_shard_size="1MB",
    ),
    "tiny_draft": Spec(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            tie_word_embeddings=True,
            **COMMON,
        ),
        steps=1000,
        learning_rate=6e-3,
        max_shard_size="1MB",
    ),
}
CLASSES = {"falcon": FalconForCausalLM, "llama": LlamaForCausalLM}


def corpus() -> list[str]:
    """The documents, in the order in which the models learn them as each other's continuation."""
    texts = tiny_corpus.documents()
    random.Random(0).shuffle(texts)
    return texts


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` ids that adds nothing before or after a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def stream(documents: list[list[int]], generator: torch.Generator) -> Iterator[int]:
    """An endless stream of the documents' tokens, mostly in order, so that a greedy answer continues after its end."""
    index = 0
    while True:
        if torch.rand((), generator=generator) >= IN_ORDER:
            index = int(torch.randint(len(documents), (), generator=generator))
        yield from documents[index]
        index = (index + 1) % len(documents)


def batch(documents: list[list[int]], length: int, generator: torch.Generator) -> torch.Tensor:
    """(TOKENS_PER_STEP / length, length + 1) ids; each row starts at the beginning of a document."""
    rows = []
    for _ in range(TOKENS_PER_STEP // length):
        rows.append(list(itertools.islice(stream(documents, generator), length + 1)))
    return torch.tensor(rows)


def with_noise(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The ids, with a share of `NOISE` replaced by random ids other than special tokens."""
    hit = torch.rand(ids.shape, generator=generator) < NOISE
    return torch.where(hit, torch.randint(2, VOCAB_SIZE, ids.shape, generator=generator), ids)


def rate(step: int, spec: Spec) -> float:
    """Learning rate: linear warm-up over 5 % of the steps, then cosine decay to zero."""
    warmup = spec.steps // 20
    done = (step - warmup) / (spec.steps - warmup)
    if step < warmup:
        return spec.learning_rate * ((step + 1) / (warmup + 1))
    return spec.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done))


def train(name: str, spec: Spec, documents: list[list[int]]) -> tuple[PreTrainedModel, float]:
    """The trained model in bfloat16, and the mean loss of its last 20 steps in nats per token."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = CLASSES[spec.config.model_type](spec.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    losses = []
    progress = tqdm(range(spec.steps), desc=name)
    for step in progress:
        optimizer.param_groups[0]["lr"] = rate(step, spec)
        ids = batch(documents, CONTEXT if step % 8 == 7 else 128, generator)
        logits = model(with_noise(ids[:, :-1], generator), use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return model.eval().to(torch.bfloat16), sum(losses[-20:]) / 20


CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""One line per turn; the models were not trained on roles."""


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, max_shard_size: str) -> None:
    """Write the checkpoint and make it readable for all: safetensors creates files that only their owner can read."""
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def show(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print the answers to `PROMPTS`, computed in float32 from the weights as they are saved."""
    model.float()
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
        print(f"  {prompt}|{tokenizer.decode(output)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded models on the project's own text.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder that gets one folder for each model")
    parser.add_argument("--only", choices=SPECS, help="train only this one")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    texts = corpus()
    tokenizer = train_tokenizer(texts)
    documents = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
    print(f"{len(documents)} documents, {sum(map(len, documents))} tokens")
    for name, spec in SPECS.items():
        if args.only not in (None, name):
            continue
        model, loss = train(name, spec, documents)
        tokenizer.chat_template = None
        if name == "tiny_llama":
            tokenizer.chat_template = CHAT_TEMPLATE
        save(model, tokenizer, args.out / name, spec.max_shard_size)
        print(f"{name}: {model.num_parameters()} parameters, loss {loss:.3f}")
        show(model, tokenizer)


if __name__ == "__main__":
    main()
