"""`generate_program.py FOLDER`: prints the answers of transformers' `model.generate` as the last line of stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rank_program import PROMPTS, SCENARIOS, UNLIKE, unlike_texts
from transformers import AutoModelForCausalLM

from launcher.config.schema import SamplingConfig
from launcher.prompts.prompts import encode


def main() -> None:
    folder = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = encode(PROMPTS.read_text().splitlines(), folder)
    eos = model.generation_config.eos_token_id
    answers = {}
    for scenario in ("greedy", "ignore_eos"):
        answers[scenario] = [answer(model, prompt.token_ids, eos, SCENARIOS[scenario]) for prompt in prompts]
    if folder.name == "tiny_llama":
        prompts = encode(unlike_texts(), folder)
        answers["unlike"] = [answer(model, prompt.token_ids, eos, UNLIKE) for prompt in prompts]
    print(json.dumps(answers))


def answer(model: torch.nn.Module, ids: tuple[int, ...], eos: int, sampling: SamplingConfig) -> list[int]:
    options = {"eos_token_id": None} if sampling.ignore_eos else {}
    given = torch.tensor([ids])
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=sampling.max_new_tokens, do_sample=False,
        pad_token_id=eos, **options,
    )  # fmt: skip
    return made[0, len(ids) :].tolist()


if __name__ == "__main__":
    main()
