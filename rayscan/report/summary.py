"""What each cluster consists of, from sequences and their clusters: the table the report is drawn from.

Everything is counted over the flows themselves (ports, destinations, gaps), not over sequences, so that a
short sequence weighs little.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayscan import schema
from rayscan.captures.scanners import Scanners
from rayscan.errors import DataError
from rayscan.report.members import (
    Ints,
    Members,
    as_numpy,
    count_of,
    distinct,
    flow_times,
    grouped,
    join,
    micros,
    pack,
    rank_of,
    sort_within,
    top_of,
    values,
)

TOP = 5
EXAMPLES = 20
HOUR_US, DAY_US = 3_600_000_000, 86_400_000_000
STEPS_US = {"day": HOUR_US, "week": 6 * HOUR_US, "month": DAY_US, "all": 7 * DAY_US}
"""Steps of `activity` for each length of a period."""

SUMMARY = pa.schema([pa.field("period", pa.string(), nullable=False), *schema.SUMMARY])

ACTIVITY = pa.schema(
    [
        pa.field("period", pa.string(), nullable=False),
        pa.field("cluster", pa.int64()),  # null: all clusters that have no rows of their own
        pa.field("start", schema.TIME, nullable=False),
        pa.field("flows", pa.int64(), nullable=False),
    ]
)


def summarise(
    sequences: pa.Table, clusters: pa.Table, period: str, known: Scanners | None = None
) -> pa.Table:
    """One row per cluster of a period, columns as in SUMMARY, in order of the cluster number.

    `sequences` and `clusters` are rows of schema.SEQUENCES and schema.CLUSTERS of that period. Sequences
    without a cluster are left out. Raises DataError if a clustered sequence is missing or occurs twice.
    """
    m = join(sequences, clusters)
    sources, counts, examples = _sources(m)
    columns = {
        "period": pa.repeat(pa.scalar(period, pa.string()), m.size),
        "cluster": m.clusters,
        "sequences": m.sequences_of,
        "sources": sources,
        "networks": distinct(m.group, m.src >> 8, m.size),
        "flows": counts,
        "first": pa.array(_extreme(np.minimum, m, "start"), schema.TIME),
        "last": pa.array(_extreme(np.maximum, m, "end"), schema.TIME),
        "ports": _ports(m),
        **_labels(m),
        **_scanners(m, known),
        **{name: _share(m, name) for name in schema.FINGERPRINTS},
        "destinations": _destinations(m),
        "median_gap_us": _median_gap(m),
        "cohesion": _cohesion(clusters, m),
        "examples": examples,
    }
    return pa.table(columns, schema=SUMMARY)


def activity(
    sequences: pa.Table, clusters: pa.Table, period: str, *, top: int = 12, step_us: int = DAY_US
) -> pa.Table:
    """Flows per time step of the `top` clusters with the most sources, columns as in ACTIVITY.

    All other clusters together are the rows with a null cluster. Steps begin at multiples of `step_us`
    since 1970 UTC; steps without a flow have no row. Order: cluster rank, then time.
    """
    m = join(sequences, clusters)
    rank = rank_of(m, top)
    row, time = flow_times(m)
    step = np.floor_divide(time, step_us)
    low = int(step.min()) if len(step) else 0
    width = int(step.max()) - low + 1 if len(step) else 1
    flows = np.bincount(rank[m.group[row]] * width + (step - low), minlength=0)
    at = np.flatnonzero(flows)
    names = np.full(top + 1, -1, np.int64)
    names[rank] = m.clusters
    shown = at // width
    columns = {
        "period": pa.repeat(pa.scalar(period, pa.string()), len(at)),
        "cluster": pa.array(names[shown], mask=shown == top),
        "start": pa.array((at % width + low) * step_us, schema.TIME),
        "flows": flows[at].astype(np.int64),
    }
    return pa.table(columns, schema=ACTIVITY)


def usual_port(sequences: pa.Table) -> pa.Array:
    """The port (ICMP: type) most flows of a sequence go to, int32: of equals the smaller; null if unknown."""
    row, port = values(sequences, "dst_port")
    keys, counts = count_of((row << 32 | port)[port != schema.MISSING])
    picked, _ = top_of(keys >> 32, counts, keys, sequences.num_rows, 1)
    port = np.full(sequences.num_rows, schema.MISSING, np.int32)
    port[keys[picked] >> 32] = keys[picked] & 0xFFFFFFFF
    return pa.array(port, mask=port == schema.MISSING)


# ---------------------------------------------------------------------------------------------
# One column each
# ---------------------------------------------------------------------------------------------


def _sources(m: Members) -> tuple[Ints, Ints, pa.Array]:
    """Per cluster: distinct sources, flows, and the sources with the most flows."""
    length = as_numpy(m.rows["length"])
    keys, inverse = np.unique(pack(m.group, m.src), return_inverse=True)
    flows = np.bincount(inverse, weights=length, minlength=len(keys)).astype(np.int64)
    group, src = keys >> 32, keys & 0xFFFFFFFF
    picked, offsets = top_of(group, flows, src, m.size, EXAMPLES)
    examples = pa.ListArray.from_arrays(offsets, pa.array(src[picked], pa.int64()))
    per_cluster = np.bincount(m.group, weights=length, minlength=m.size).astype(np.int64)
    return np.bincount(group, minlength=m.size), per_cluster, examples


def _ports(m: Members) -> pa.Array:
    group, port = grouped(m, "dst_port")
    proto = values(m.rows, "proto")[1]
    if len(port) and (port.max() > 0xFFFF or proto.max() > 0xFF or min(port.min(), proto.min()) < -1):
        raise DataError("a flow has a port beyond 65535 or a protocol beyond 255; ingest its capture again")
    keys, counts = count_of(group << 26 | (proto + 1) << 17 | (port + 1))
    group = keys >> 26
    code = keys & (1 << 26) - 1
    picked, offsets = top_of(group, counts, code, m.size, TOP)
    total = np.bincount(group, weights=counts, minlength=m.size)
    share = counts[picked] / total[group[picked]]
    number = (code[picked] & (1 << 17) - 1) - 1
    fields = [
        pa.array(((code[picked] >> 17) - 1).astype(np.int16)),
        pa.array(number.astype(np.int32), mask=number == schema.MISSING),
        pa.array(share, pa.float64()),
    ]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(schema.PORT)))


def _labels(m: Members) -> dict[str, pa.Array]:
    """Columns `labels`, those with the most sources, and `labelled`."""
    labels, labelled = _names(m.group, m.src, m.rows["label"], m.size, schema.LABEL)
    return {"labels": labels, "labelled": labelled}


def _scanners(m: Members, known: Scanners | None) -> dict[str, pa.Array]:
    """Columns `scanners`, `known` and `days_off`, null where nobody can be known."""
    if known is None:
        return {
            name: pa.nulls(m.size, SUMMARY.field(name).type) for name in ("scanners", "known", "days_off")
        }
    found = known.known(m.rows)
    scanners, count = _names(m.group, m.src, found.organisation, m.size, schema.SCANNER)
    days = np.zeros(m.size, np.int32)
    np.maximum.at(days, m.group, found.days_off.astype(np.int32))
    return {"scanners": scanners, "known": pa.array(count), "days_off": pa.array(days, mask=count == 0)}


def origins(clusters: pa.Table, period: str, names_of: Callable[[Ints], pa.Array]) -> pa.Table:
    """Columns period, cluster and names: for each cluster the most common names of its sources.

    `names_of` gives a name, or null, for each of many addresses.
    """
    numbers, group = np.unique(as_numpy(clusters["cluster"]), return_inverse=True)
    pairs = np.unique(pack(group.astype(np.int64), as_numpy(clusters["src"])))
    group, src = pairs >> 32, pairs & 0xFFFFFFFF
    names, _ = _names(group, src, names_of(src), len(numbers), schema.LABEL)
    return pa.table(
        {"period": pa.repeat(pa.scalar(period), len(numbers)), "cluster": numbers, "names": names}
    )


def _names(
    group: Ints, src: Ints, column: pa.Array | pa.ChunkedArray, size: int, item: pa.StructType
) -> tuple[pa.Array, Ints]:
    """Per group the names that most of its sources have, as a list of `item`, and how many have any."""
    names = pc.unique(column.drop_null())
    names = names.take(pc.array_sort_indices(names))
    n_names = max(len(names), 1)
    code = pc.fill_null(pc.index_in(column, value_set=names), -1).to_numpy().astype(np.int64)
    known = code >= 0
    pairs, pair = np.unique(pack(group[known], src[known]), return_inverse=True)
    triples = np.unique(pair * n_names + code[known])  # a source may carry several names
    keys, counts = count_of((pairs[triples // n_names] >> 32) * n_names + triples % n_names)
    picked, offsets = top_of(keys // n_names, counts, keys, size, TOP)
    fields = [names.take(pa.array(keys[picked] % n_names)), pa.array(counts[picked])]
    listed = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(item)))
    return listed, np.bincount(pairs >> 32, minlength=size)


def _share(m: Members, name: str) -> pa.Array:
    """Share of flows with a fingerprint, over the sequences that record it; null where none does."""
    column = m.rows[name]
    known = column.is_valid().to_numpy()
    weight = as_numpy(m.rows["length"]) * known
    share = pc.fill_null(column, 0).to_numpy().astype(np.float64)
    total = np.bincount(m.group, weights=weight, minlength=m.size)
    with_it = np.bincount(m.group, weights=weight * share, minlength=m.size)
    return pa.array(with_it / np.maximum(total, 1), mask=total == 0)


def _destinations(m: Members) -> pa.Array:
    group, dst = grouped(m, "dst")
    known = dst != schema.MISSING
    count = distinct(group[known], dst[known], m.size)
    return pa.array(count, mask=count == 0)


def _median_gap(m: Members) -> pa.Array:
    """Median gap in µs, rounded down; the first flow of a sequence has no gap and does not count."""
    row, gap = values(m.rows, "gap_us")
    inner = np.diff(row, prepend=-1) == 0
    group, gap = sort_within(m.group[row[inner]], gap[inner])
    count = np.bincount(group, minlength=m.size)
    start = np.cumsum(count) - count
    last = max(len(gap) - 1, 0)
    low, high = (np.clip(start + middle, 0, last) for middle in ((count - 1) // 2, count // 2))
    median = (gap[low] + gap[high]) // 2 if len(gap) else np.zeros(m.size, np.int64)
    return pa.array(median, mask=count == 0)


def _cohesion(clusters: pa.Table, m: Members) -> pa.Array:
    group = np.searchsorted(m.clusters, as_numpy(clusters["cluster"]))
    weight = np.bincount(group, weights=as_numpy(clusters["weight_own"]), minlength=m.size)
    others = m.sequences_of - 1
    return pa.array(weight / np.maximum(m.sequences_of * others, 1), mask=others == 0)


def _extreme(choose: np.ufunc, m: Members, name: str) -> Ints:
    """Smallest (np.minimum) or largest (np.maximum) time of each cluster, µs."""
    times = micros(m.rows[name])
    order = np.argsort(m.group, kind="stable")
    return np.asarray(choose.reduceat(times[order], np.cumsum(m.sequences_of) - m.sequences_of))
