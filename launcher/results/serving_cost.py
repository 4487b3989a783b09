"""The share of an engine's speed that is lost where the same engine is asked over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.results.record import Record


def serving_cost(base: Record, other: Record, speed: float) -> tuple[float | None, str | None]:
    """The share of the engine's tokens/s that is lost to HTTP, the server's scheduler and the client.

    One of the runs asked a server and the other did not; `speed` is that of `other` over that of `base`. None and the
    reason where the two differ in more than the server, None and None where it is not a question.
    """
    servings = [record.metrics.serving if record.metrics else None for record in (base, other)]
    if (servings[0] is None) == (servings[1] is None):
        return None, None
    engine, endpoint, serving = (base, other, servings[1]) if servings[0] is None else (other, base, servings[0])
    assert serving is not None
    served = (serving.software or "another engine").replace(",", " ").split(" ")[0]
    if served != engine.backend:
        what = serving.software or f"an engine that it does not name (dialect={serving.dialect})"
        return None, f"the cost of serving is not known: the server has {what}"
    if (engine.config.get("load"), engine.num_devices) != (endpoint.config.get("load"), _devices(endpoint, engine)):
        return None, "the cost of serving is not known: the load or the number of devices is another"
    return 1 - (speed if endpoint is other else 1 / speed), None


def _devices(endpoint: Record, engine: Record) -> int:
    """The number of devices of a server that was started; for an address it is taken to be the engine's."""
    is_started = endpoint.config.get("server", {}).get("name", "none") != "none"
    if is_started:
        return endpoint.num_devices
    return engine.num_devices
