"""A sequence as one row of numbers: how much, how fast, to whom, to which ports.

Methods for flow records (CLAN, auto-encoders, trees) want a fixed number of features per unit, and a record
of a telescope carries few. These are the ones that need no learning; shares of the commonest services are
learnt apart (`CommonServices`), since which they are depends on the data. What no flow of a sequence records
is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan.methods.method import ABSENT, Flows, flows_of, list_column, list_values, positions
from rayscan.schema import MISSING

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]

PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}
TCP_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "psh": 8, "ack": 16, "urg": 32}
PORT_RANGES = {"system": (0, 1024), "registered": (1024, 49_152), "ephemeral": (49_152, 65_536)}


def window_statistics(sequences: pa.Table) -> tuple[list[str], F64]:
    """Names of the features and their values, float64 (N, features), for a table of `schema.SEQUENCES`."""
    flows = flows_of(sequences)
    n = sequences.num_rows
    later = np.zeros(len(flows.row), np.bool_)  # not the first flow of its sequence
    later[1:] = flows.row[1:] == flows.row[:-1]
    found: dict[str, F64] = {}
    lengths = np.bincount(flows.row, minlength=n).astype(np.float64)
    found["flows"] = np.log1p(lengths)
    found |= _times(flows, later, n)
    found |= _spread("destination", flows.row, flows.dst, n)
    found |= _spread("service", flows.row, flows.service, n)
    found |= _steps(flows, later, n)
    for name, number in PROTOCOLS.items():
        found[f"share of {name}"] = _share(flows.row, flows.proto == number, n)
    for name, (low, high) in PORT_RANGES.items():
        found[f"share of {name} ports"] = _share(flows.row, (flows.port >= low) & (flows.port < high), n)
    for name in ("ttl", "size"):
        found |= _summary(name, flows.row, recorded(sequences, name), n)
    flags = recorded(sequences, "tcp_flags")
    for name, bit in TCP_FLAGS.items():
        known = ~np.isnan(flags)
        set_ = known & ((np.where(known, flags, 0).astype(np.int64) & bit) != 0)
        found[f"share of {name}"] = np.where(
            _share(flows.row, known, n) > 0, _share(flows.row, set_, n), np.nan
        )
    return list(found), np.column_stack(list(found.values()))


class CommonServices:
    """Shares of the services that most training sequences contact, and of all others together."""

    def __init__(self, services: Ints) -> None:
        self.services = services  # int64 (S,), ascending

    @classmethod
    def learn(cls, sequences: pa.Table, count: int) -> CommonServices:
        """The `count` services that occur in the most sequences; ties go to the smaller number."""
        flows = flows_of(sequences)
        pairs = np.unique(np.stack([flows.row, flows.service]), axis=1)
        services, sequences_with = np.unique(pairs[1], return_counts=True)
        common = services[np.lexsort((services, -sequences_with))[:count]]
        return cls(np.sort(common))

    def shares(self, sequences: pa.Table) -> F64:
        """Share of a sequence's flows to each service, the rest last: float64 (N, S + 1)."""
        flows = flows_of(sequences)
        width = len(self.services) + 1
        place = positions(self.services, flows.service)
        cell = flows.row * width + np.where(place == ABSENT, width - 1, place)
        counts = np.bincount(cell, minlength=sequences.num_rows * width).reshape(-1, width)
        return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def _times(flows: Flows, later: NDArray[np.bool_], n: int) -> dict[str, F64]:
    """Logarithms of the gaps in seconds, and of how long the sequence lasts."""
    gaps = np.diff(flows.ts, prepend=flows.ts[:1])[later] / 1e6
    found = _summary("log gap", flows.row[later], np.log1p(1e3 * gaps), n)
    lasting = np.bincount(flows.row[later], gaps, minlength=n)
    return found | {"log duration": np.log1p(1e3 * lasting)}


def _spread(name: str, row: Ints, value: Ints, n: int) -> dict[str, F64]:
    """How many different values a sequence has, as a share of its flows, and their entropy in bits."""
    known = value != MISSING
    row, value = row[known], value[known]
    if not len(row):
        return dict.fromkeys((f"distinct {name}s", f"{name} entropy"), np.full(n, np.nan))
    pairs, counts = np.unique(np.stack([row, value]), axis=1, return_counts=True)
    total = np.bincount(row, minlength=n)
    share = counts / total[pairs[0]]
    distinct = np.bincount(pairs[0], minlength=n)
    entropy = np.bincount(pairs[0], -share * np.log2(share), minlength=n)
    empty = total == 0
    return {
        f"distinct {name}s": np.where(empty, np.nan, distinct / np.maximum(total, 1)),
        f"{name} entropy": np.where(empty, np.nan, entropy),
    }


def _steps(flows: Flows, later: NDArray[np.bool_], n: int) -> dict[str, F64]:
    """Share of flows whose destination is the one before, or the next address up: how a scan walks."""
    known = flows.dst != MISSING
    pair = later & known
    pair[1:] &= known[:-1]
    step = np.diff(flows.dst, prepend=flows.dst[:1])
    return {
        "share of repeated destinations": _mean(flows.row[pair], (step == 0)[pair].astype(np.float64), n),
        "share of next destinations": _mean(flows.row[pair], (step == 1)[pair].astype(np.float64), n),
    }


def recorded(sequences: pa.Table, name: str) -> F64:
    """A list column end to end, one value per flow, NaN where it is not recorded: float64 (F,)."""
    lists = list_column(sequences, name)
    has = np.repeat(pc.is_valid(lists).to_numpy(zero_copy_only=False), sequences["length"].to_numpy())
    values = np.full(len(has), np.nan)
    found = list_values(lists)
    values[has] = np.where(found == MISSING, np.nan, found)
    return values


def _summary(name: str, row: Ints, value: F64, n: int) -> dict[str, F64]:
    """Mean, standard deviation, least and largest of the recorded values of each sequence."""
    known = ~np.isnan(value)
    row, value = row[known], value[known]
    mean = _mean(row, value, n)
    variance = _mean(row, (value - mean[row]) ** 2, n)
    return {
        f"mean {name}": mean,
        f"deviation of {name}": np.sqrt(variance),
        f"least {name}": _extreme(np.minimum, row, value, n),
        f"largest {name}": _extreme(np.maximum, row, value, n),
    }


def _mean(row: Ints, value: F64, n: int) -> F64:
    total = np.bincount(row, minlength=n)
    means = np.bincount(row, value, minlength=n) / np.maximum(total, 1)
    return np.asarray(np.where(total > 0, means, np.nan))


def _share(row: Ints, chosen: NDArray[np.bool_], n: int) -> F64:
    total = np.bincount(row, minlength=n)
    return np.asarray(np.bincount(row, chosen, minlength=n) / np.maximum(total, 1))


def _extreme(which: np.ufunc, row: Ints, value: F64, n: int) -> F64:
    found: Callable[..., Any] = which.at
    extreme = np.full(n, np.inf if which is np.minimum else -np.inf)
    found(extreme, row, value)
    return np.asarray(np.where(np.isinf(extreme), np.nan, extreme))
