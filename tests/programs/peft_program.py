"""Greedy tokens of peft's own model for each of several adapters: `peft_program.py MODEL IDS NAME=FOLDER...` as JSON.

IDS are comma-separated token ids; the key "" has the tokens of the model without an adapter.
"""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, ids = sys.argv[1], torch.tensor([[int(one) for one in sys.argv[2].split(",")]])
    answers = {}
    for word in ("=", *sys.argv[3:]):
        name, _, adapter = word.partition("=")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        made = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        answers[name] = made[0, ids.shape[1] :].tolist()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
