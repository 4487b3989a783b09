"""Scoring a text: every engine gives the likelihoods of plain transformers, however it holds the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from running import command_line, launcher
from transformers import AutoModelForCausalLM

from launcher.backends.base import LIKELIEST, Score
from launcher.composition.compose import compose_run
from launcher.models import EMBEDDED
from launcher.prompts.quality import windows
from launcher.results.figures.quality import Quality, agreement, kl_divergence, quality_of
from launcher.system.typed import decode

ENGINES = "transformers,fsdp,tensor_parallel,deepspeed,vllm"
ONCE = ("measure.repeats=1", "measure.warmup=0", "sampling.max_new_tokens=2", "accelerator=cpu")


@pytest.mark.slow
def test_every_engine_scores_a_text_as_transformers_does(tmp_path: Path) -> None:
    asked = ("model=tiny_llama", "measure.quality=builtin")
    cut = windows(compose_run(list(asked)), EMBEDDED / "tiny_llama", 2048)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny_llama", dtype=torch.float32)
    likelihoods, best = [], []
    with torch.inference_mode():
        for window in cut:
            ids = torch.tensor([window])
            likely = model(ids).logits[0, :-1].log_softmax(-1)
            likelihoods.append(likely.gather(1, ids[0, 1:, None]).sum().item())
            best += likely.argmax(-1).tolist()

    ended = launcher("-m", f"backend={ENGINES}", *asked, *ONCE, f"output_dir={tmp_path}", timeout=280)
    assert ended.code == 0, ended.err
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*x*/record.json")]
    assert sorted(record["backend"] for record in records) == sorted(ENGINES.split(","))
    for record in records:
        assert record["quality"]["tokens"] == len(best)
        assert record["quality"]["perplexity"] == pytest.approx(math.exp(-sum(likelihoods) / len(best)), rel=1e-3)
        same = sum(left == right for left, right in zip(record["quality"]["best_tokens"], best, strict=True))
        assert same >= len(best) - 2, record["backend"]  # two logits may differ only in the last bit
    assert " ".join(ended.out.split()).count(f"of {len(best):,} tokens of builtin") == 4
    lines = ended.out.splitlines()
    headings = [line.split("┃") for line in lines if "perplexity ┃" in line or "┃ KL≥," in line]
    titles = [" ".join(words).split() for words in zip(*headings, strict=True)]
    assert titles[-4:-1] == [["perplexity"], ["same", "top-1"], ["KL≥,", "nats"]]
    shown = next(line for line in lines if line.startswith("│ transformers")).split("│")
    assert [cell.strip() for cell in shown[-3:-1]] == ["100.0%", "0"]
    qualities = {record["backend"]: decode(record["quality"], Quality) for record in records}
    for quality in qualities.values():  # including vLLM's
        kl = kl_divergence(qualities["transformers"], quality)
        assert kl is not None
        assert kl < 1e-4


def test_the_divergence_of_what_is_known_is_a_lower_bound_and_near() -> None:
    """Compared with the divergence over the whole vocabulary, for distributions that differ as after quantization."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 512, generator=generator)
    qualities, likely = [], []
    for noise in (0.0, 0.3):
        moved = (logits + noise * torch.randn(200, 512, generator=generator)).log_softmax(-1).double()
        values, tokens = moved.topk(LIKELIEST)
        places = [dict(zip(*place, strict=True)) for place in zip(tokens.tolist(), values.tolist(), strict=True)]
        qualities.append(quality_of("text", [Score(-1.0, tuple(tokens[:, 0].tolist()), tuple(places))]))
        likely.append(moved)
    exact = (likely[0].exp() * (likely[0] - likely[1])).sum(1).mean().item()
    bound = kl_divergence(*qualities)
    assert bound is not None
    assert 0.4 * exact < bound <= exact + 1e-4
    assert kl_divergence(qualities[0], qualities[0]) == 0
    assert kl_divergence(qualities[0], Quality("text", 200, 9.0, qualities[0].best_tokens)) is None


def test_agreement_is_of_one_text_only() -> None:
    base, other = Quality("builtin", 4, 9.0, (1, 2, 3, 4)), Quality("builtin", 4, 9.5, (1, 2, 5, 4))
    assert agreement(base, other) == 0.75
    assert agreement(base, None) is None
    assert agreement(base, Quality("mine.txt", 4, 9.5, (1, 2, 5, 4))) is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["backend=dummy", "measure.quality=builtin"], "backend=dummy cannot score a text. HINT: measure.quality=null"),
        (["backend=fsdp", "measure.quality=/dev/zero"], "/dev/zero"),
        (["backend=fsdp", "measure.quality=/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_a_text_that_cannot_be_shown_is_one_line(asked: list[str], message: str, tmp_path: Path) -> None:
    ended = command_line(*asked, f"output_dir={tmp_path}")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert message in ended.err
    assert list(tmp_path.iterdir()) == []
