"""Tensor parallelism: attention is cut by heads, the MLP by columns and rows, the vocabulary by rows.

Parameters are plain tensors, each marked with the block of the model that it holds. With DTensors, as in torch's own
parallelize_module, a decode step took three times as long: each operation is dispatched in Python.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding as lookup
from torch.nn.functional import pad

from shards.engines.tensor_parallel import uncuttable
from shards.errors import PlanError
from shards.load.blocks import Block, mark_block
from shards.model.known_shape import known_shape
from shards.parallel.fully_shard import decoder_layers
from shards.parallel.products import ProductLinear

if TYPE_CHECKING:
    from shards.parallel.collectives import Collectives

_LLAMA = {
    "self_attn.q_proj": "column", "self_attn.k_proj": "column", "self_attn.v_proj": "column",
    "self_attn.o_proj": "row", "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row",
}  # fmt: skip
_FALCON = {
    "self_attention.query_key_value": "column", "self_attention.dense": "held row",
    "mlp.dense_h_to_4h": "column", "mlp.dense_4h_to_h": "row",
}  # fmt: skip
LAYER_PLANS = {"falcon": _FALCON, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
HEAD_COUNTS = ("num_heads", "num_kv_heads")  # attributes by which a Falcon's attention shapes its projections
ELSEWHERE = "backend=fsdp, which shards every model"


class PartLinear(ProductLinear):
    """A linear layer whose inputs are split over several ranks."""

    held: list[torch.Tensor]
    collectives: Collectives
    size: int

    def largest_over_ranks(self, largest: torch.Tensor) -> torch.Tensor:
        parts = largest.new_empty(self.size, *largest.shape)
        self.collectives.gather(parts, largest)
        return parts.amax(0)


class RowLinear(PartLinear):
    """A row-parallel layer: the products of all ranks with their own inputs are summed, together with the held ones."""

    def forward(self, part: torch.Tensor) -> torch.Tensor:
        total = self.product(part)
        while self.held:
            total += self.held.pop()
        self.collectives.add_up(total)
        if self.bias is None:
            return total
        return total + self.bias.to(total.dtype)


class HeldRowLinear(PartLinear):
    """A row-parallel layer whose output is only added to that of another one: its product is held, and both are summed
    over the ranks in a single all-reduce.

    Returns what remains to be added: its bias, or zero.
    """

    def forward(self, part: torch.Tensor) -> torch.Tensor:
        self.held[:] = [self.product(part)]
        if self.bias is None:
            return part.new_zeros(())
        return self.bias


class VocabularyEmbedding(nn.Embedding):
    """An embedding whose rows are split over several ranks: each looks up its own rows, and the results are summed."""

    first: int
    collectives: Collectives

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = ids - self.first
        elsewhere = (rows < 0) | (rows >= self.weight.shape[0])
        vectors = lookup(rows.masked_fill_(elsewhere, 0), self.weight).masked_fill_(elsewhere[..., None], 0)
        self.collectives.add_up(vectors)
        return vectors


class VocabularyHead(ProductLinear):
    """A head whose rows are split over several ranks, equally on all but the last. Every rank gets all logits, or, if
    it is not `gathering`, those of its own rows, from which `best` determines the best over all ranks."""

    size: int
    first: int
    collectives: Collectives
    gathering: bool = True

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        part = self.product(hidden)
        if not self.gathering:
            return part
        part = pad(part, (0, ceil(self.out_features / self.size) - part.shape[-1]))
        parts = part.new_empty(self.size, *part.shape)
        self.collectives.gather(parts, part)
        return parts.movedim(0, -2).flatten(-2)[..., : self.out_features]

    def best(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The token with the largest logit of each row over all ranks' parts [rows, own part], and its lead over the
        second largest. Only these are exchanged, as float32, which represents token ids exactly."""
        token, lead = best_of(part)
        mine = torch.stack((part.gather(1, token[:, None])[:, 0], lead, token + self.first), 1)
        gathered = mine.new_empty(self.size, *mine.shape)
        self.collectives.gather(gathered, mine)
        value, leads, tokens = gathered.unbind(-1)
        rank = value.argmax(0, keepdim=True)
        others = value.scatter(0, rank, -torch.inf).amax(0)
        gap = torch.minimum(leads.gather(0, rank)[0], value.amax(0) - others)
        return tokens.gather(0, rank)[0].long(), gap


Best = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def best_of(logits: torch.Tensor, out: Best | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The token with the largest of the logits [rows, vocabulary] of each row, and its lead over the second largest.

    The first one of equal logits. `out` has three tensors [rows or more, 1] for values, tokens and runner-ups; nothing
    else is allocated. The logits are unchanged on return.
    """
    rows = len(logits)
    if out is None:
        value = logits.new_empty(rows, 1)
        out = value, value.new_empty(rows, 1, dtype=torch.long), torch.empty_like(value)
    value, token, second = (each[:rows] for each in out)
    torch.max(logits, -1, keepdim=True, out=(value, token))
    logits.scatter_(1, token, -torch.inf)
    torch.amax(logits, -1, keepdim=True, out=second)
    logits.scatter_(1, token, value)
    return token[:, 0], torch.sub(value, second, out=second)[:, 0]


CLASSES = {"row": RowLinear, "held row": HeldRowLinear, "embedding": VocabularyEmbedding, "head": VocabularyHead}


def tensor_parallel_model(model: nn.Module, rank: int, size: int, collectives: Collectives) -> nn.Module:
    """Cut `model` in place to the part of rank `rank` of `size`; all ranks together compute the model's logits.

    The model is on meta and stays there, for `shards.load.load` to fill. Norms and the biases of row-parallel layers
    stay whole; tied weights stay tied. With `collectives` the ranks make two all-reduces for each layer (Falcon one)
    and one for the embedding, and gather the logits of the requested positions. Raises PlanError for a model that
    cannot be cut like this. With a size of one the model stays as it is.
    """
    if size == 1:
        return model
    if model.config.model_type not in LAYER_PLANS:
        raise PlanError(f"There is no tensor-parallel cut for model_type {model.config.model_type!r}.", ELSEWHERE)
    if problem := uncuttable(known_shape(model.config.to_dict()), size):
        raise PlanError(problem, ELSEWHERE)
    plan = LAYER_PLANS[model.config.model_type]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {embedding: "embedding", head: "head"}
    is_tied = embedding.weight is head.weight
    for name, module in model.named_modules():
        kind = ends.get(module) or plan.get(".".join(name.split(".")[-2:]))
        if kind is not None:
            _keep_part(name, module, int("row" in kind), rank, size)
            module.__class__ = CLASSES.get(kind, type(module))
            module.collectives, module.size = collectives, size
    embedding.first = head.first = rank * ceil(embedding.num_embeddings / size)
    for layer in decoder_layers(model):
        attention = getattr(layer, "self_attention", None)
        for name in HEAD_COUNTS:  # attention uses these, not the shapes of its cut projections
            if hasattr(attention, name):
                setattr(attention, name, getattr(attention, name) // size)
        summands: list[torch.Tensor] = []  # products of the layer for one all-reduce
        for module in layer.modules():
            if isinstance(module, PartLinear):
                module.held = summands
    if is_tied:
        head.weight = embedding.weight
    return model


def _keep_part(name: str, module: nn.Module, dim: int, rank: int, size: int) -> None:
    """Cut a module's parameters into chunks of equal length along `dim`; a bias has no dimension 1, and stays whole."""
    for leaf, whole in list(module.named_parameters(recurse=False)):
        if whole.dim() <= dim:
            continue
        shape = tuple(whole.shape)
        chunk = ceil(shape[dim] / size)
        start = min(rank * chunk, shape[dim])
        local = (*shape[:dim], min(chunk, shape[dim] - start), *shape[dim + 1 :])
        part = nn.Parameter(torch.empty(local, dtype=whole.dtype, device="meta"), requires_grad=False)
        mark_block(part, Block(f"{name}.{leaf}", shape, (0,) * dim + (start,) + (0,) * (len(shape) - dim - 1)))
        setattr(module, leaf, part)
