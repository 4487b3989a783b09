"""Many requests at a time, with a fixed number of open requests or at fixed arrival times, and the client's own
cost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

TICK_S = 0.01

Work = TypeVar("Work")


@dataclass(slots=True)
class ClientCost:
    """The client's own cost: CPU seconds, and the delays of its event loop and its requests."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    loop_lag_s: list[float] = field(default_factory=list)
    send_lag_s: list[float] = field(default_factory=list)


class Load(Generic[Work]):
    """Calls `send` for each piece of work, in order.

    Closed loop: `concurrency` requests are open at a time, and the next begins when one ends. Open loop: each begins at
    its time in `arrivals`, however many are open. An exception of `send` ends the load and is raised.
    """

    def __init__(
        self,
        send: Callable[[Work], Coroutine[Any, Any, None]],
        concurrency: int | None = None,
        arrivals: Sequence[float] | None = None,
    ) -> None:
        self.send, self.concurrency, self.arrivals = send, concurrency, arrivals
        self.cost = ClientCost()

    async def run(self, work: Sequence[Work]) -> ClientCost:
        """Process all work; returns the client's cost."""

        async def send_remaining() -> None:
            for item in remaining:
                await self.send(item)

        remaining = iter(work)
        ticker = asyncio.create_task(self._tick())
        start, cpu = perf_counter(), thread_time()
        try:
            async with asyncio.TaskGroup() as group:
                if self.arrivals is None:
                    for _ in range(min(self.concurrency or len(work), len(work))):
                        group.create_task(send_remaining())
                else:
                    for item, moment in zip(work, self.arrivals, strict=True):
                        await asyncio.sleep(max(start + moment - perf_counter(), 0))
                        self.cost.send_lag_s.append(perf_counter() - start - moment)
                        group.create_task(self.send(item))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            ticker.cancel()
        self.cost.wall_s, self.cost.cpu_s = perf_counter() - start, thread_time() - cpu
        return self.cost

    async def _tick(self) -> None:
        """Measure the delay of the event loop: the time stamp of every answer can be late by as much."""
        while True:
            due = perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.cost.loop_lag_s.append(perf_counter() - due)
