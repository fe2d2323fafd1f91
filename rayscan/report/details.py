"""What opens under a campaign: when and where it is active, how its sources spread, what it does, in words.

Only clusters that get a row in the report have details, so their number, not that of the sequences, bounds
the page. Which campaigns are near is told by the mean similarity of their sequences, the very figure that the
threshold is held against: two campaigns above it would have been one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan import schema
from rayscan.clustering.moves import Clusters
from rayscan.clustering.quotient import nearest_clusters
from rayscan.report import words
from rayscan.report.members import (
    Ints,
    Members,
    as_numpy,
    count_of,
    distinct,
    flow_times,
    grouped,
    join,
    pack,
    rank_of,
    top_of,
)

HOUR_US = 3_600_000_000
NETWORKS = 6
SEQUENCES = 3
NEAR = 3

NETWORK = pa.struct([("network", pa.int64()), ("sources", pa.int64())])
TARGET = pa.struct([("network", pa.int64()), ("share", pa.float64())])
SAID = pa.struct([("src", pa.int64()), ("text", pa.string())])
NEIGHBOUR = pa.struct([("cluster", pa.int64()), ("similarity", pa.float64())])

DETAILS = pa.schema(
    [
        pa.field("period", pa.string(), nullable=False),
        pa.field("cluster", pa.int64(), nullable=False),
        pa.field("hours", pa.list_(pa.int64()), nullable=False),  # flows by hour of the day, UTC: 24 numbers
        pa.field("slash8", pa.int64(), nullable=False),  # distinct /8 and /16 of the sources
        pa.field("slash16", pa.int64(), nullable=False),
        pa.field("networks16", pa.list_(NETWORK), nullable=False),  # the /16 with the most sources
        pa.field("distinct_ports", pa.int64(), nullable=False),  # of each protocol
        pa.field("targets", pa.list_(TARGET), nullable=False),  # the /24 of destinations with the most flows
        pa.field("said", pa.list_(SAID), nullable=False),  # the most typical sequences, in words
    ]
)


def details(sequences: pa.Table, clusters: pa.Table, period: str, limit: int) -> pa.Table:
    """Columns as in DETAILS for the `limit` clusters with the most sources, in order of the cluster number.

    `sequences` and `clusters` are rows of schema.SEQUENCES and schema.CLUSTERS of the period. Clusters of one
    sequence have no details.
    """
    large = np.flatnonzero(rank_of(joined := join(sequences, clusters), limit) < limit)
    large = large[joined.sequences_of[large] > 1]
    kept = joined.clusters[large]
    inside = pc.is_in(clusters["cluster"], value_set=pa.array(kept))
    m = _only(joined, large)
    columns = {
        "period": pa.repeat(pa.scalar(period, pa.string()), m.size),
        "cluster": m.clusters,
        "hours": _hours(m),
        "slash8": distinct(m.group, m.src >> 24, m.size),
        "slash16": distinct(m.group, m.src >> 16, m.size),
        "networks16": _networks(m),
        "distinct_ports": _distinct_ports(m),
        "targets": _targets(m),
        "said": _said(m, clusters.filter(inside)),
    }
    return pa.table(columns, schema=DETAILS)


def _only(m: Members, kept: Ints) -> Members:
    """The members of these clusters, given by ascending position."""
    place = np.full(m.size, -1, np.int64)
    place[kept] = np.arange(len(kept))
    inside = np.flatnonzero(place[m.group] >= 0)
    return Members(m.rows.take(inside), place[m.group[inside]], m.clusters[kept], m.sequences_of[kept])


def _hours(m: Members) -> pa.Array:
    row, time = flow_times(m)
    hour = np.floor_divide(time, HOUR_US) % 24
    flows = np.bincount(m.group[row] * 24 + hour, minlength=24 * m.size)
    return pa.ListArray.from_arrays(pa.array(np.arange(m.size + 1) * 24, pa.int32()), pa.array(flows))


def _networks(m: Members) -> pa.Array:
    sources = count_of(pack(m.group, m.src))[0]
    keys, counts = count_of(pack(sources >> 32, (sources & 0xFFFFFFFF) >> 16))
    picked, offsets = top_of(keys >> 32, counts, keys, m.size, NETWORKS)
    fields = [pa.array((keys[picked] & 0xFFFF) << 16), pa.array(counts[picked])]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(NETWORK)))


def _distinct_ports(m: Members) -> Ints:
    group, port = grouped(m, "dst_port")
    proto = grouped(m, "proto")[1]
    return distinct(group, (proto + 1) << 17 | (port + 1), m.size)


def _targets(m: Members) -> pa.Array:
    group, dst = grouped(m, "dst")
    known = dst != schema.MISSING
    keys, counts = count_of(pack(group[known], dst[known] >> 8))
    total = np.bincount(group[known], minlength=m.size)
    picked, offsets = top_of(keys >> 32, counts, keys, m.size, NETWORKS)
    share = counts[picked] / total[keys[picked] >> 32]
    fields = [pa.array((keys[picked] & 0xFFFFFF) << 8), pa.array(share, pa.float64())]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(TARGET)))


def _said(m: Members, clusters: pa.Table) -> pa.Array:
    """Of each cluster the sequences most alike to the others, at most one of a source."""
    ids = as_numpy(m.rows["sequence_id"])
    of, weights = as_numpy(clusters["sequence_id"]), as_numpy(clusters["weight_own"])
    order = np.argsort(of)
    weight = weights[order][np.searchsorted(of, ids, sorter=order)]
    by_source = np.lexsort((ids, -weight, m.src, m.group))
    first = np.diff(pack(m.group, m.src)[by_source], prepend=-1) != 0
    best = by_source[first]
    best = best[np.lexsort((ids[best], -weight[best], m.group[best]))]
    counts = np.bincount(m.group[best], minlength=m.size)
    place = np.arange(len(best)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = m.rows.take(best[place < SEQUENCES]).to_pylist()
    fields = [
        pa.array([row["src"] for row in rows], pa.int64()),
        pa.array([words.sequence(row) for row in rows], pa.string()),
    ]
    offsets = pa.array(np.r_[0, np.cumsum(np.minimum(counts, SEQUENCES))], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(SAID)))


def nearest(clusters: Ints, sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> list[Any]:
    """For each cluster the NEAR others of largest mean similarity, as rows of NEIGHBOUR, nearest first.

    `sums` (K, d) are sums of unit vectors, `sizes` (K,) their numbers.
    """
    index, similarity = nearest_clusters(Clusters(sums, sizes), NEAR)
    return [
        [{"cluster": name, "similarity": value} for name, value in zip(names, values, strict=True)]
        for names, values in zip(clusters[index].tolist(), similarity.tolist(), strict=True)
    ]


def nearest_to(place: int, sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> list[tuple[int, float]]:
    """`nearest` of the one cluster at `place`: where the others stand, and their similarity; O(K d)."""
    means = sums / np.maximum(sizes, 1)[:, None]
    similarity = means @ means[place]
    similarity[place] = -np.inf
    best = np.argsort(-similarity, kind="stable")[: min(NEAR, len(sizes) - 1)]
    return list(zip(best.tolist(), similarity[best].tolist(), strict=True))
