"""What a capture holds, counted while it streams by, in memory that does not grow with it.

Different addresses are counted by their k smallest hashes (k minimum values: Bar-Yossef et al., Counting
distinct elements in a data stream, RANDOM 2002). Up to k of them the count is exact; beyond it is an
estimate with a relative standard error of 1 / sqrt(k - 2), 0.1 % for k = 2^20, at 8 MB. Ports are counted
exactly, since there are at most 2^24 of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan.captures.columns import BATCH, Batch, Reject, merge_rejects
from rayscan.config import Input
from rayscan.keys import hash64
from rayscan.schema import FINGERPRINTS

SKETCH = 1 << 20
_MOST_NAMES = 10_000
OTHERS = "(others)"
"""Stands for the labels or sensors beyond the first 10,000."""

_NO_PORT = 0xFFFF + 1
_PORTS = _NO_PORT + 1
USES = {
    **{name: f"a model cannot use the input {name}" for name in get_args(Input)},
    "sensor": "captures.sensor can name the telescope",
    "fingerprint": "shares of ZMap, masscan and Mirai stay unknown",
    "label": "nothing can be evaluated by label",
}
"""What it means where a column is missing."""


class Distinct:
    """How many different integers there were."""

    def __init__(self, most: int = SKETCH) -> None:
        self.exact = True
        self._most = most
        self._smallest: NDArray[np.uint64] = np.empty(0, np.uint64)

    def add(self, values: NDArray[np.integer]) -> None:
        self._join(hash64(np.unique(values)))

    def merge(self, other: Distinct) -> None:
        self.exact = self.exact and other.exact
        self._join(other._smallest)

    def _join(self, hashes: NDArray[np.uint64]) -> None:
        joined = np.union1d(self._smallest, hashes)
        self.exact = self.exact and len(joined) <= self._most
        self._smallest = joined[: self._most]

    @property
    def count(self) -> int:
        if self.exact:
            return len(self._smallest)
        return round((len(self._smallest) - 1) / (float(self._smallest[-1]) / 2.0**64))


class Tally:
    """How often each of some integers came."""

    def __init__(self) -> None:
        self.values: NDArray[np.int64] = np.empty(0, np.int64)
        self.counts: NDArray[np.int64] = np.empty(0, np.int64)

    def add(self, values: NDArray[np.int64]) -> None:
        self._join(*np.unique(values, return_counts=True))

    def merge(self, other: Tally) -> None:
        self._join(other.values, other.counts)

    def _join(self, values: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        self.values, place = np.unique(np.r_[self.values, values], return_inverse=True)
        self.counts = np.bincount(place, np.r_[self.counts, counts], len(self.values)).astype(np.int64)

    def most(self, n: int) -> list[tuple[int, int]]:
        """The n most frequent, (value, count), the smaller value first among equals."""
        order = np.lexsort((self.values, -self.counts))[:n]
        return [(int(self.values[i]), int(self.counts[i])) for i in order]


@dataclass
class Inspection:
    """What has been seen of one capture, or of several (`merge`)."""

    flows: int = 0
    duplicates: int = 0
    backwards: int = 0  # flows earlier than the one before them
    first: int | None = None  # microseconds since 1970, as all times here
    last: int | None = None
    sources: Distinct = field(default_factory=Distinct)
    destinations: Distinct = field(default_factory=Distinct)
    ports: Tally = field(default_factory=Tally)  # proto * _PORTS + port
    recorded: Counter[str] = field(default_factory=Counter)  # flows that have a value in a column
    fingerprints: Counter[str] = field(default_factory=Counter)
    sensors: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)
    _latest: int | None = None  # time of the flow before

    def add(self, batch: Batch) -> None:
        flows = batch.flows
        self.rejects = merge_rejects([*self.rejects, *batch.rejects])
        self.duplicates += batch.duplicates
        self.flows += flows.num_rows
        if not flows.num_rows:
            return
        self._add_times(flows["ts"].cast(pa.int64()).to_numpy())
        self.sources.add(flows["src"].to_numpy())
        self.destinations.add(flows["dst"].drop_null().to_numpy())
        port = pc.fill_null(flows["dst_port"].cast(pa.int64()), _NO_PORT).to_numpy()
        self.ports.add(flows["proto"].cast(pa.int64()).to_numpy() * _PORTS + port)
        for name in BATCH.names:
            self.recorded[name] += flows.num_rows - flows[name].null_count
        marks = flows["fingerprint"].drop_null().to_numpy()
        for name, bit in FINGERPRINTS.items():
            self.fingerprints[name] += int(np.count_nonzero(marks & bit))
        for name, names in (("sensor", self.sensors), ("label", self.labels)):
            found = pc.value_counts(flows[name].drop_null()).to_pylist()
            _count(names, {item["values"]: item["counts"] for item in found})

    def _add_times(self, ts: NDArray[np.int64]) -> None:
        before = ts[0] if self._latest is None else self._latest
        self.backwards += int(np.count_nonzero(np.diff(ts, prepend=before) < 0))
        self._latest = int(ts[-1])
        self._span(int(ts.min()), int(ts.max()))

    def _span(self, first: int, last: int) -> None:
        self.first = first if self.first is None else min(self.first, first)
        self.last = last if self.last is None else max(self.last, last)

    def merge(self, other: Inspection) -> None:
        """Count another capture too."""
        self.flows += other.flows
        self.duplicates += other.duplicates
        self.backwards += other.backwards
        if other.first is not None and other.last is not None:
            self._span(other.first, other.last)
        self.sources.merge(other.sources)
        self.destinations.merge(other.destinations)
        self.ports.merge(other.ports)
        self.recorded += other.recorded
        self.fingerprints += other.fingerprints
        _count(self.sensors, other.sensors)
        _count(self.labels, other.labels)
        self.rejects = merge_rejects([*self.rejects, *other.rejects])

    @property
    def rows(self) -> int:
        """Rows read so far, whatever became of them."""
        return self.flows + sum(reject.count for reject in self.rejects if reject.rows_lost)

    def _lost(self, kind: str) -> int:
        return sum(reject.count for reject in self.rejects if reject.lost == kind)

    def facts(self, top: int) -> dict[str, Any]:
        """Everything as JSON-able data; times are ISO 8601, shares are of all flows."""
        protocols = Counter[int]()
        for key, n in zip(self.ports.values // _PORTS, self.ports.counts, strict=True):
            protocols[int(key)] += int(n)
        return {
            "flows": self.flows,
            "rejected": self._lost("rows"),
            "left_out": self._lost("left out"),
            "rejects": [
                {"reason": r.reason, "offset": r.offset, "count": r.count, "lost": r.lost}
                for r in sorted(self.rejects, key=lambda r: (-r.count, r.reason))
            ],
            "duplicates": self.duplicates,
            "backwards": self.backwards,
            "first": _iso(self.first),
            "last": _iso(self.last),
            "sources": {"count": self.sources.count, "exact": self.sources.exact},
            "destinations": {"count": self.destinations.count, "exact": self.destinations.exact},
            "protocols": [
                {"proto": proto, "flows": n, "share": n / self.flows}
                for proto, n in protocols.most_common(top)
            ],
            "ports": [
                {"proto": key // _PORTS, "port": _port(key % _PORTS), "flows": n, "share": n / self.flows}
                for key, n in self.ports.most(top)
            ],
            "columns": {name: self.recorded[name] / max(self.flows, 1) for name in BATCH.names},
            "missing": {
                name: USES.get(name, "") for name in BATCH.names if self.flows and not self.recorded[name]
            },
            "fingerprints": {
                name: self.fingerprints[name] / self.recorded["fingerprint"]
                for name in FINGERPRINTS
                if self.recorded["fingerprint"]
            },
            "sensors": dict(self.sensors.most_common(top)),
            "labels": dict(self.labels.most_common(top)),
        }


def _port(number: int) -> int | None:
    return None if number == _NO_PORT else number


def _count(names: Counter[str], more: dict[str, int]) -> None:
    for name, count in more.items():
        names[name if name in names or len(names) < _MOST_NAMES else OTHERS] += count


def _iso(us: int | None) -> str | None:
    return None if us is None else (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)).isoformat()
