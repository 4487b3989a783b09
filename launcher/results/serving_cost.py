"""The share of an engine's speed that is lost by serving it over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.results.measured import Serving
    from launcher.results.record import Record


def serving_cost(base: Record, other: Record, speed: float) -> tuple[float | None, str | None]:
    """The share of the engine's tokens/s that is lost to HTTP, the server's scheduler and the client.

    It is defined if one of the runs called a server and the other did not; `speed` is the speed of `other` over that of
    `base`. Returns None and the reason if the runs differ in more than the server, None and None if neither or both
    called a server.
    """
    engine, endpoint = base, other
    if _serving(base) is not None:
        engine, endpoint, speed = other, base, 1 / speed
    serving = _serving(endpoint)
    if serving is None or _serving(engine) is not None:
        return None, None
    served = (serving.software or "another engine").replace(",", " ").split(" ")[0]
    if served != engine.backend:
        software = serving.software or f"an engine that it does not name (dialect={serving.dialect})"
        return None, f"the cost of serving is not known: the server has {software}"
    is_started = endpoint.config.get("server", {}).get("name", "none") != "none"  # else its devices are unknown
    has_other_devices = is_started and endpoint.num_devices != engine.num_devices
    if has_other_devices or engine.config.get("load") != endpoint.config.get("load"):
        return None, "the cost of serving is not known: the load or the number of devices is another"
    return 1 - speed, None


def _serving(record: Record) -> Serving | None:
    if record.metrics is None:
        return None
    return record.metrics.serving
