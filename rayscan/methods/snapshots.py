"""Graphs of which host contacts which port, one for each slice of time, and what is known of their nodes.

Hosts are sources. Ports are services (protocol and port): the commonest of the slice each have a node, all
others share one. An edge weighs as many flows as its host sent to its port within the slice; sequences do not
keep how many packets a flow had. Every slice is counted for itself. (The published code groups by host and
port over the whole month and keeps the first day, so that each pair is in one graph only, with flows of
days to come.)

Features are those of the paper that a flow record can tell: 12 of volume, and least, largest, sum, mean and
deviation of size and TTL. Those of maximum segment size, window and timestamp option are left out. What the
captures do not record is 0, and its largest value, 0, marks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.methods.method import ABSENT, flows_of, positions
from rayscan.methods.statistics import recorded
from rayscan.schema import MISSING

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]

OTHER = int(np.iinfo(np.int64).max)
"""The service of all that are not among the commonest; the last when they ascend."""

_FIVE = ("least", "largest", "sum", "mean", "deviation")
FEATURES = (
    "neighbours",
    *(f"{which} of flows per neighbour" for which in _FIVE),
    "destinations",
    *(f"{which} of flows per destination" for which in _FIVE),
    *(f"{which} of size" for which in _FIVE),
    *(f"{which} of ttl" for which in _FIVE),
)
"""Of a node; the neighbours of a host are ports, and the other way round. Ports have no destinations."""

NEVER_RECORDED = ("maximum segment size", "TCP window", "TCP timestamp")
"""What else the paper takes five figures of each."""


@dataclass(frozen=True)
class Snapshot:
    """The graph of one slice: h hosts, s services, E edges. Nodes are numbered hosts first.

    number    its time in microseconds UTC, divided by the length of a slice
    hosts     addresses, ascending
    services  protocol and port as one number, ascending
    host      (E,) node of the edge's host, with
    service   (E,) node of its service, h or more; ordered by host, then service
    weight    (E,) flows, or ln(1 + flows)
    features  (h + s, features), as they were counted
    """

    number: int
    hosts: Ints
    services: Ints
    host: Ints
    service: Ints
    weight: F32
    features: F32

    @property
    def largest(self) -> F32:
        """The largest value of each feature among hosts and among services, (2, features)."""
        h = len(self.hosts)
        return np.stack([self.features[:h].max(axis=0), self.features[h:].max(axis=0)])


def snapshots_of(sequences: pa.Table, length_us: int, commonest: int, *, log_weights: bool) -> list[Snapshot]:
    """The slices that have flows, in order of time, of a table of `schema.SEQUENCES`.

    With `log_weights`, ln(1 + flows) takes the place of flows, in edges and features alike.
    """
    flows = flows_of(sequences)
    noted = [recorded(sequences, name) for name in ("size", "ttl")]
    number = flows.ts // length_us
    order = np.argsort(number, kind="stable")
    numbers, begins = np.unique(number[order], return_index=True)
    return [
        _snapshot(
            slice_,
            flows.src[rows],
            flows.service[rows],
            flows.dst[rows],
            [values[rows] for values in noted],
            commonest,
            log_weights,
        )
        for slice_, rows in zip(numbers.tolist(), np.split(order, begins[1:]), strict=False)
    ]


def same_nodes(of: Snapshot, among: Snapshot) -> Ints:
    """For each node of a snapshot which one it is in another, `ABSENT` where it is not there."""
    service = positions(among.services, of.services)
    shifted = np.where(service == ABSENT, ABSENT, service + len(among.hosts))
    return np.concatenate([positions(among.hosts, of.hosts), shifted])


def _snapshot(
    number: int, src: Ints, service: Ints, dst: Ints, noted: list[F64], commonest: int, log: bool
) -> Snapshot:
    found, flows = np.unique(service, return_counts=True)
    common = np.sort(found[np.lexsort((found, -flows))[:commonest]])
    service = np.where(positions(common, service) == ABSENT, OTHER, service)
    hosts, host = np.unique(src, return_inverse=True)
    services, port = np.unique(service, return_inverse=True)
    h, s = len(hosts), len(services)
    edge_host, edge_port, weight = _weigh(host, port, log)
    known = dst != MISSING
    dst_host, _, dst_weight = _weigh(host[known], dst[known], log)
    of_hosts = [
        _count_and_five(edge_host, weight, h),
        _count_and_five(dst_host, dst_weight, h),
        *(_five(host, values, h) for values in noted),
    ]
    of_services = [
        _count_and_five(edge_port, weight, s),
        np.zeros((s, 1 + len(_FIVE))),
        *(_five(port, values, s) for values in noted),
    ]
    features = np.concatenate([np.hstack(of_hosts), np.hstack(of_services)])
    return Snapshot(
        number,
        hosts,
        services,
        edge_host,
        h + edge_port,
        weight.astype(np.float32),
        features.astype(np.float32),
    )


def _weigh(a: Ints, b: Ints, log: bool) -> tuple[Ints, Ints, F64]:
    """The different pairs, ordered, and how often each occurs."""
    width = int(b.max(initial=0)) + 1
    cells, counts = np.unique(a * width + b, return_counts=True)
    return cells // width, cells % width, np.log1p(counts) if log else counts.astype(np.float64)


def _count_and_five(group: Ints, value: F64, n: int) -> F64:
    return np.column_stack([np.bincount(group, minlength=n), _five(group, value, n)])


def _five(group: Ints, value: F64, n: int) -> F64:
    """Least, largest, sum, mean and standard deviation of each group's recorded values, (n, 5).

    Groups without values have zeros, those with one value the deviation 0.
    """
    known = ~np.isnan(value)
    group, value = group[known], value[known]
    count = np.bincount(group, minlength=n)
    total = np.bincount(group, value, n)
    mean = total / np.maximum(count, 1)
    squares = np.bincount(group, (value - mean[group]) ** 2, n)
    least, largest = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(least, group, value)
    np.maximum.at(largest, group, value)
    deviation = np.sqrt(squares / np.maximum(count - 1, 1))
    return np.where(count[:, None] > 0, np.column_stack([least, largest, total, mean, deviation]), 0)
