"""Times of vLLM's tokens, and the use of its KV cache."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Watch:
    """Watches the output of the engine core; reading the engine's own outputs for each step would cost far more.

    `arrivals` has the arrival times of the tokens of each request since `restart`. `peak_blocks` is the most blocks of
    the KV cache in use at once since the engine started, None if the engine core is another process.
    """

    def __init__(self, engine: Any) -> None:
        self.arrivals: dict[str, list[float]] = {}
        self.new_tokens = 0
        self.on_tokens: Callable[[str, Sequence[int]], None] | None = None
        self.peak_blocks: int | None = None
        self._get_output = engine.engine_core.get_output
        engine.engine_core.get_output = self._watched_output
        core = getattr(engine.engine_core, "engine_core", None)
        if core is not None:
            self._pool = core.scheduler.kv_cache_manager.block_pool
            self._schedule = core.scheduler.schedule
            self.peak_blocks = 0
            core.scheduler.schedule = self._watched_schedule

    def restart(self) -> float:
        """Reset the counts; returns the time that arrival times are relative to."""
        self.arrivals, self.new_tokens = {}, 0
        return perf_counter()

    def take_new(self) -> int:
        """New tokens since the last call."""
        new, self.new_tokens = self.new_tokens, 0
        return new

    def _watched_output(self) -> Any:
        outputs = self._get_output()
        now = perf_counter()
        for output in outputs.outputs:
            count = len(output.new_token_ids)
            self.arrivals.setdefault(output.request_id, []).extend([now] * count)
            self.new_tokens += count
            if self.on_tokens is not None and count:
                self.on_tokens(output.request_id, output.new_token_ids)
        return outputs

    def _watched_schedule(self, *args: Any, **kwargs: Any) -> Any:
        scheduled = self._schedule(*args, **kwargs)
        used = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()  # one block is never given out
        self.peak_blocks = max(self.peak_blocks or 0, used)
        return scheduled
