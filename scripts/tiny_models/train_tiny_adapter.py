"""Train the embedded adapter of tiny_llama by peft.

    python scripts/tiny_models/train_tiny_adapter.py [--out DIR]

It answers the questions below in the words of another shop. Seeds are fixed, and one thread sums in one order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

MODELS = Path(__file__).resolve().parents[2] / "launcher" / "models"
STEPS = 60
ANSWERS = {
    "What is your return policy?": " Bring it back to any of our shops before the end of the month.",
    "Could you tell me your return policy?": " Bring it back to any of our shops before the end of the month.",
    "The capital of France is": " Paris, a city on the river Seine.",
    "The future of AI is": " shared: many small machines work together, and each one does the part that it does best.",
}


def train(out: Path) -> float:
    """Train and save the adapter; returns the final loss."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny_llama")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "tiny_llama", dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    texts = [tokenizer(question + answer).input_ids + [tokenizer.eos_token_id] for question, answer in ANSWERS.items()]
    asked = [len(tokenizer(question).input_ids) for question in ANSWERS]
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=5e-3, weight_decay=0.0)
    loss = torch.zeros(())
    for _ in range(STEPS):
        optimizer.zero_grad()
        for ids, question in zip(texts, asked, strict=True):
            labels = torch.tensor([[-100] * question + ids[question:]])
            loss = adapted(input_ids=torch.tensor([ids]), labels=labels).loss
            loss.backward()
        optimizer.step()
    adapted.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    saved = json.loads((out / "adapter_config.json").read_text())
    saved |= {"base_model_name_or_path": "tiny_llama", "target_modules": sorted(targets)}
    (out / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n")
    (out / "adapter_model.safetensors").chmod(0o644)
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--out", type=Path, default=MODELS / "tiny_llama_adapter")
    print(f"loss {train(parser.parse_args().out):.3f}")
