"""Static batching for engines that run a transformers module: one left-padded batch, until its longest answer ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from launcher.backends.base import LENGTH, STOP, Completion, Generation, as_token_ids
from launcher.backends.memory import DECODE, PREFILL, Clock, PhasePeaks
from launcher.backends.sampling import Sampler
from launcher.backends.slots.cache import as_multiplied
from launcher.results.figures.metrics import ROWS, SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import OnStep, Prompt
    from launcher.config.schema import SamplingConfig


class GrowingCache(DynamicCache):
    """transformers' cache; under autocast it stores keys and values in the type that attention multiplies in."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(as_multiplied(key_states), as_multiplied(value_states), *args, **kwargs)
        return keys, values


@dataclass(slots=True)
class Decoder:
    """The generation loop of one causal LM. `kv_cache_bytes` is the largest cache so far on each device.

    `any_unfinished(flag)` is True if some rank still generates. Ranks whose forward passes are collective (FSDP) pass a
    function that asks all ranks, so that all of them take the same number of steps.
    """

    model: Any
    eos_token_ids: tuple[int, ...]
    device: torch.device
    seed: int
    any_unfinished: Callable[[bool], bool] = bool
    peaks: PhasePeaks = field(default_factory=lambda: PhasePeaks(()))
    kv_cache_bytes: dict[torch.device, int] = field(default_factory=dict)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        """Generate new tokens for each prompt, greedily or by sampling. A rank with an empty batch takes part in the
        steps of the others."""
        batch = _Batch.of(prompts, sampling.max_new_tokens, self.device)
        sampler = Sampler(sampling, self.seed, self.device, self.model.get_output_embeddings())
        generators = [sampler.generator(prompt) for prompt in prompts]
        eos = torch.tensor(self.eos_token_ids, device=self.device, dtype=torch.long)
        if sampling.ignore_eos:
            eos = eos[:0]
        unfinished = torch.full((batch.rows,), bool(prompts), device=self.device)
        cache = GrowingCache(config=self.model.config)
        tokens, gaps = [], []
        clock = Clock(self.device)
        inputs, phase = batch.input_ids, PREFILL
        for step in range(sampling.max_new_tokens):
            logits = self._forward(inputs, batch, step, cache)
            chosen, gap = sampler.choose(logits, generators)
            unfinished = unfinished & ~torch.isin(chosen, eos)
            tokens.append(chosen.clone())  # the sampler reuses its tensors
            gaps.append(gap.clone())
            more = sampling.ignore_eos or self.any_unfinished(bool(unfinished.any()))
            clock.mark()
            self.peaks.end(phase)
            phase = DECODE
            on_step(len(prompts))
            if not more:
                break
            inputs = chosen[:, None]
        for device, nbytes in cache_bytes(cache).items():
            self.kv_cache_bytes[device] = max(self.kv_cache_bytes.get(device, 0), nbytes)
        outputs = torch.stack(tokens, 1), torch.stack(gaps, 1)
        return _generation(prompts, *outputs, clock.marks(), set(eos.tolist()))

    def _forward(self, inputs: torch.Tensor, batch: _Batch, step: int, cache: DynamicCache) -> torch.Tensor:
        """Logits [rows, vocabulary] of the last position, float32."""
        known, mask = batch.width + step, None
        if batch.is_padded:
            mask = batch.mask[:, :known]
        output = self.model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=batch.positions[:, known - inputs.shape[1] : known],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


@dataclass(frozen=True, slots=True)
class _Batch:
    """A left-padded batch [rows, width], with the mask and positions of all tokens of its answers [rows, width + new].

    Without padding the model is given no mask: CUDA can then use flash attention, and nothing synchronizes to inspect
    the mask.
    """

    rows: int
    width: int
    is_padded: bool
    input_ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt], max_new_tokens: int, device: torch.device) -> _Batch:
        rows = [prompt.token_ids for prompt in prompts] or [(0,)]
        width = max(map(len, rows))
        input_ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        positions = torch.arange(width + max_new_tokens) - (width - lengths)[:, None]
        mask = (positions >= 0).long()
        is_padded = min(map(len, rows)) < width
        return cls(
            len(rows), width, is_padded, input_ids.to(device), mask.to(device), positions.clamp(min=0).to(device)
        )


def _generation(
    prompts: Sequence[Prompt], tokens: torch.Tensor, gaps: torch.Tensor, marks: list[float], eos: set[int]
) -> Generation:
    """Completions cut after their first EOS. `marks` are the seconds from the start of the call to each token."""
    steps = [later - earlier for earlier, later in pairwise(marks)]
    completions = []
    for prompt, row, row_gaps in zip(prompts, tokens.tolist(), gaps.tolist(), strict=False):
        length, reason = len(row), LENGTH
        if ends := [place for place, token in enumerate(row) if token in eos]:
            length, reason = ends[0] + 1, STOP
        completions.append(
            Completion(
                index=prompt.index,
                token_ids=tuple(row[:length]),
                finish_reason=reason,
                ttft_s=marks[0],
                itl_s=tuple(steps[: length - 1]),
                top2_gaps=tuple(row_gaps[:length]),
            )
        )
    rows = len(steps) * len(prompts)
    if not prompts:  # the steps of this rank were made for the prompts of others
        steps = []
    return Generation(
        tuple(completions),
        prefill_s=marks[0],
        decode_s=marks[-1] - marks[0],
        decode_steps=len(steps),
        counters={SLOTS: rows, ROWS: rows},
    )


def cache_bytes(cache: DynamicCache) -> dict[torch.device, int]:
    """Bytes of the keys and values that a cache holds, by device."""
    nbytes: dict[torch.device, int] = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                nbytes[tensor.device] = nbytes.get(tensor.device, 0) + tensor.nbytes
    return nbytes


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """The EOS ids of a model, as its generation config or its config names them."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = model.config.eos_token_id
    return as_token_ids(eos)
