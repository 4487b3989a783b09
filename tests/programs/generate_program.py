"""`generate_program.py FOLDER`: what transformers' own `model.generate` answers, as the last line of stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rank_program import PROMPTS, SCENARIOS
from transformers import AutoModelForCausalLM

from launcher.prompts.prompts import encode


def main() -> None:
    folder = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = encode(PROMPTS.read_text().splitlines(), folder)
    eos = model.generation_config.eos_token_id
    answers = {}
    for scenario in ("greedy", "ignore_eos"):
        ignore = SCENARIOS[scenario].ignore_eos
        answers[scenario] = [answer(model, prompt.token_ids, eos, ignore) for prompt in prompts]
    print(json.dumps(answers))


def answer(model: torch.nn.Module, ids: tuple[int, ...], eos: int, ignore_eos: bool) -> list[int]:
    options = {"eos_token_id": None} if ignore_eos else {}
    given = torch.tensor([ids])
    made = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False, pad_token_id=eos, **options
    )
    return made[0, len(ids) :].tolist()


if __name__ == "__main__":
    main()
