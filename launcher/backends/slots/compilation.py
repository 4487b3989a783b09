"""`measure.compile`: decode steps of fixed sizes, prepared before the measurement, and used if the tokens of a batch
stay the same."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import torch

from launcher.backends.base import Compilation
from launcher.backends.slots.static import Compiled, Graphs
from launcher.config.parts.compiling import Compile
from launcher.config.parts.storage import Offload
from shards.errors import UserError
from shards.machine.process_group import any_rank
from shards.parallel.fully_shard import decoder_layers, is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from launcher.backends.base import Generation
    from launcher.backends.slots.decoder import SlotDecoder
    from launcher.backends.slots.device import Forward, Slots
    from launcher.config.schema import RunConfig

NEAR = 16.0  # a gap of so many roundings of a logit of 1 is a tie; logits of models are a few times larger than 1
MOST_VERSIONS = 4096  # compiled versions of the code of a layer: inductor makes one for each layer and reach


def settled(config: RunConfig, device: torch.device) -> Compile:
    """The compilation mode to use; `auto` means CUDA graphs for one process with one GPU, none otherwise.

    In other cases no mode is known to be faster: inductor takes a minute for each step, and on a CPU the steps are not
    faster.
    """
    configured = config.measure.compile
    if configured is not Compile.auto:
        return configured
    is_plain = config.num_devices == 1 and config.offload is Offload.none and not config.speculative.is_on
    if is_plain and device.type == "cuda":
        return Compile.cudagraph
    return Compile.none


@torch.inference_mode()
def compile_steps(decoder: SlotDecoder, config: RunConfig, generate: Callable[[], Generation]) -> Compilation:
    """Prepare the decode steps of a decoder as configured. `generate` answers a batch, first without, then with them.

    With `auto` they are discarded if they fail or change tokens, unless the tokens were equally likely in the precision
    of the products. A mode that was configured by name is kept, and its failure ends the run.
    """
    way, is_asked = settled(config, decoder.device), config.measure.compile is not Compile.auto
    if way is Compile.none:
        return Compilation(way.name, 0.0)
    start = perf_counter()
    before = generate()
    assert decoder.slots is not None
    obstacle: str | None = None
    other = wrong = 0
    try:
        decoder.slots.static = make_static(way, decoder.slots)
        other, wrong = differing(before, generate(), getattr(torch, config.precision.products.value))
    except RuntimeError as error:  # all errors of compilers and captures are RuntimeErrors
        decoder.slots.static = None
        obstacle = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if is_asked and obstacle is not None:
        raise UserError(f"measure.compile={way.name} fails: {obstacle}", "measure.compile=none")
    prompts = len(before.completions)
    if not is_asked and any_rank(obstacle is not None or wrong > 0):
        decoder.slots.static = None
        why = obstacle or f"with measure.compile={way.name} {wrong} of {prompts} prompts had different tokens"
        return Compilation(Compile.none.name, perf_counter() - start, why)
    note = None
    if other:
        note = f"{other} of {prompts} prompts had different tokens than without it"
        if not wrong:
            note += ", from a position where two were equally likely"
    return Compilation(way.name, perf_counter() - start, note)


def make_static(way: Compile, slots: Slots) -> Forward:
    """The prepared steps of slots that have answered a batch before."""
    if way is Compile.cudagraph:
        return Graphs(slots)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_VERSIONS
    if slots.device.type == "cpu":
        torch._inductor.config.compile_threads = 1  # compile in this process
    if not is_sharded(slots.model):
        return Compiled(slots, torch.compile(slots.forward, dynamic=False))
    switch = Switch(slots)
    for layer in decoder_layers(slots.model):  # hooks around the forward gather a sharded layer: they are not compiled
        switch.add(layer)
    return Compiled(slots, switch.forward)


class Switch:
    """Layers with compiled forwards, which are used for decode steps only."""

    def __init__(self, slots: Slots) -> None:
        self.slots, self.is_on = slots, False

    def add(self, layer: torch.nn.Module) -> None:
        plain = layer.forward
        compiled = torch.compile(plain, dynamic=False)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.is_on:
                return compiled(*args, **kwargs)
            return plain(*args, **kwargs)

        layer.forward = forward

    def forward(self, rows: int, reach: int) -> torch.Tensor:
        self.is_on = True
        try:
            return self.slots.forward(rows, reach)
        finally:
            self.is_on = False


def differing(before: Generation, after: Generation, products: torch.dtype) -> tuple[int, int]:
    """The number of prompts whose tokens differ between two generations, and how many of them differ for more than
    rounding: their first different token was less likely by more than some roundings of its logit in the type
    `products`."""
    width = NEAR * torch.finfo(products).eps
    later = {item.index: item.token_ids for item in after.completions}
    other = wrong = 0
    for item in before.completions:
        tokens = later[item.index]
        if tokens == item.token_ids:
            continue
        other += 1
        pairs = zip(item.token_ids, tokens, strict=False)
        index = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        wrong += index is None or not item.top2_gaps[index] <= width  # a NaN gap counts as wrong
    return other, wrong
