"""Convert a LoRA adapter saved by peft to LitGPT's layout, and merge it into a converted checkpoint by LitGPT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
from litgpt.scripts.convert_hf_checkpoint import qkv_reassemble

from launcher.backends.litgpt.shapes import PARTS_OF_QKV, QKV, litgpt_matrix

if TYPE_CHECKING:
    from pathlib import Path

    from shards.load.adapter import Adapter

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def merge(model_file: Path, config_file: Path, adapter: Adapter, out: Path) -> None:
    """Write the weights of a converted checkpoint with an adapter in them, in fp32, as litgpt.scripts.merge_lora does.

    LitGPT has factors for every layer or for none, all of one rank: factors that the adapter lacks are zeros, and
    factors of a smaller rank are padded with zeros. Each outward factor is multiplied by its scale, since factors of
    other ranks can have other scales.
    """
    rank = max(inward.shape[0] for inward, _, _ in adapter.factors.values())
    kinds = dict.fromkeys(("query", "key", "value", "projection", "mlp"), True) | {"head": HEAD in adapter.factors}
    settings = {f"lora_{kind}": is_adapted for kind, is_adapted in kinds.items()}
    with torch.device("meta"):
        model = GPT(Config.from_file(config_file, lora_r=rank, lora_alpha=rank, **settings))
    factors = {name: torch.zeros(part.shape) for name, part in model.state_dict().items() if lora_filter(name, part)}
    for name, (inward, outward, scale) in adapter.factors.items():
        _put(factors, name.removesuffix(".weight"), inward.float(), scale * outward.float(), model.config)
    state = torch.load(model_file, mmap=True, map_location="cpu")
    is_tied = HEAD not in state
    if is_tied:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state | factors, assign=True)
    model.to(torch.float32)
    merge_lora_weights(model)
    parts = model.state_dict().items()
    merged = {name.replace("linear.", ""): part for name, part in parts if not lora_filter(name, part)}
    if is_tied:
        del merged[HEAD]
    torch.save(merged, out)


def _put(
    factors: dict[str, torch.Tensor], name: str, inward: torch.Tensor, outward: torch.Tensor, config: Config
) -> None:
    """Copy the factors of a matrix into those of LitGPT's matrix. LitGPT joins queries, keys and values: it has their
    inward factors one after the other, and one outward factor with all queries before all keys."""
    module, leaf = litgpt_matrix(name)
    into, out_of = factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]
    rank, most = len(inward), out_of.shape[1]
    first, row = [0], 0
    if leaf in PARTS_OF_QKV:
        part = PARTS_OF_QKV.index(leaf)
        first = [part * most]
        row = config.head_size * (0, config.n_head, config.n_head + config.n_query_groups)[part]
    elif module.endswith(QKV):
        first, outward = [0, most, 2 * most], qkv_reassemble(outward, config)
    for begin in first:
        into[begin : begin + rank] = inward
    out_of[row : row + len(outward), :rank] = outward
