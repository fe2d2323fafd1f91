"""What Prometheus sees of a run while it goes on: through the metrics that Ray exports on every node.

They are the driver's: Ray goes on to export its counters after it has ended, but not the lag. What is true
between runs (lag, the last exit code) monitoring asks of `rayscan status --json`.
"""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter, Gauge, Metric

_KINDS: dict[str, tuple[type[Metric], str]] = {
    "flows": (Counter, "Flows committed."),
    "rejects": (Counter, "Rows of captures that could not be read."),
    "sequences": (Counter, "Sequences built."),
    "clusters": (Counter, "Clusters formed."),
    "pairs": (Counter, "Pairs of sequences that clustering has decided on; its rate is pairs per second."),
    "lag_seconds": (Gauge, "Age of the newest flow that has come as far as the campaigns."),
}


@cache
def _metric(name: str) -> Metric:
    kind, description = _KINDS[name]
    return kind(f"rayscan_{name}", description, tag_keys=("run",))


def add(name: str, run: str, value: float) -> None:
    """Raise a counter; nothing happens for 0."""
    if value > 0:
        _metric(name).inc(value, {"run": run})


def put(name: str, run: str, value: float) -> None:
    """Set a gauge."""
    _metric(name).set(value, {"run": run})
