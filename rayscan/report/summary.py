"""What each cluster consists of, from sequences and their clusters: the table the report is drawn from.

Everything is counted over the flows themselves (ports, destinations, gaps), not over sequences, so that a
short sequence weighs little. Each count is one sort of packed 64-bit keys, (cluster, value): 10^7 flows and
10^5 clusters take seconds. The price is memory, some 40 bytes per flow of one period at the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan import schema
from rayscan.captures.scanners import Scanners
from rayscan.errors import DataError

Ints = NDArray[np.int64]

TOP = 5
EXAMPLES = 20
DAY_US = 86_400_000_000

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
    m = _join(sequences, clusters)
    sources, counts, examples = _sources(m)
    columns = {
        "period": pa.repeat(pa.scalar(period, pa.string()), m.size),
        "cluster": m.clusters,
        "sequences": m.sequences_of,
        "sources": sources,
        "networks": _distinct(m.group, m.src >> 8, m.size),
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
    m = _join(sequences, clusters)
    rank = _rank(m, top)
    row, gap = _values(m.rows, "gap_us")
    time = _micros(m.rows["start"])[row] + _running_sum(row, gap)
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
    row, port = _values(sequences, "dst_port")
    keys, counts = _count((row << 32 | port)[port != schema.MISSING])
    picked, _ = _top(keys >> 32, counts, keys, sequences.num_rows, 1)
    port = np.full(sequences.num_rows, schema.MISSING, np.int32)
    port[keys[picked] >> 32] = keys[picked] & 0xFFFFFFFF
    return pa.array(port, mask=port == schema.MISSING)


# ---------------------------------------------------------------------------------------------
# Sequences with their clusters
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Members:
    """Clustered sequences: N rows in K clusters."""

    rows: pa.Table  # N rows of schema.SEQUENCES
    group: Ints  # (N,), position of the row's cluster in `clusters`
    clusters: Ints  # (K,), ascending cluster numbers
    sequences_of: Ints  # (K,)

    @property
    def size(self) -> int:
        return len(self.clusters)

    @property
    def src(self) -> Ints:
        return _numpy(self.rows["src"])


def _join(sequences: pa.Table, clusters: pa.Table) -> _Members:
    ids = _numpy(clusters["sequence_id"])
    numbers, group, members = np.unique(_numpy(clusters["cluster"]), return_inverse=True, return_counts=True)
    order = np.argsort(ids)
    ids, group = ids[order], group[order]
    if (ids[1:] == ids[:-1]).any():
        raise DataError(f"sequence {ids[1:][ids[1:] == ids[:-1]][0]} is in two clusters of one period")
    wanted = _numpy(sequences["sequence_id"])
    at = np.minimum(np.searchsorted(ids, wanted), max(len(ids) - 1, 0))
    found = ids[at] == wanted if len(ids) else np.zeros(len(wanted), bool)
    _check_complete(ids, at[found])
    rows = sequences if found.all() else sequences.filter(pa.array(found))
    return _Members(rows, group[at[found]].astype(np.int64), numbers, members.astype(np.int64))


def _check_complete(ids: Ints, at: Ints) -> None:
    seen = np.bincount(at, minlength=len(ids))
    if (seen != 1).any():
        bad = int(np.flatnonzero(seen != 1)[0])
        what = "missing from" if seen[bad] == 0 else "more than once in"
        raise DataError(
            f"clustered sequence {ids[bad]} is {what} the sequences of the period; "
            "cluster again, from the sequences that are there now"
        )


def _values(rows: pa.Table, name: str) -> tuple[Ints, Ints]:
    """For each flow the position of its sequence, and its value: int64, MISSING where unrecorded."""
    column = rows[name]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    flat = pc.list_flatten(column)
    flat = pc.fill_null(flat, schema.MISSING) if flat.null_count else flat
    return np.repeat(np.arange(len(lengths)), lengths), flat.to_numpy().astype(np.int64, copy=False)


def _grouped(m: _Members, name: str) -> tuple[Ints, Ints]:
    """The same, with the cluster's position in place of the sequence's."""
    row, value = _values(m.rows, name)
    return m.group[row], value


def _rank(m: _Members, top: int) -> Ints:
    """Rank of each cluster by sources, then sequences, then number; `top` for all further ones."""
    sources = _distinct(m.group, m.src, m.size)
    order = np.lexsort((m.clusters, -m.sequences_of, -sources))
    rank = np.full(m.size, top, np.int64)
    rank[order[:top]] = np.arange(min(top, m.size))
    return rank


def _running_sum(row: Ints, gap: Ints) -> Ints:
    """Sum of the gaps since the first flow of each sequence; `row` is ascending."""
    total = np.cumsum(gap)
    if not len(total):
        return total
    first = np.flatnonzero(np.diff(row, prepend=row[0] - 1))
    return total - np.repeat(total[first], np.diff(first, append=len(row)))


# ---------------------------------------------------------------------------------------------
# One column each
# ---------------------------------------------------------------------------------------------


def _sources(m: _Members) -> tuple[Ints, Ints, pa.Array]:
    """Per cluster: distinct sources, flows, and the sources with the most flows."""
    length = _numpy(m.rows["length"])
    keys, inverse = np.unique(_pack(m.group, m.src), return_inverse=True)
    flows = np.bincount(inverse, weights=length, minlength=len(keys)).astype(np.int64)
    group, src = keys >> 32, keys & 0xFFFFFFFF
    picked, offsets = _top(group, flows, src, m.size, EXAMPLES)
    examples = pa.ListArray.from_arrays(offsets, pa.array(src[picked], pa.int64()))
    per_cluster = np.bincount(m.group, weights=length, minlength=m.size).astype(np.int64)
    return np.bincount(group, minlength=m.size), per_cluster, examples


def _ports(m: _Members) -> pa.Array:
    group, port = _grouped(m, "dst_port")
    proto = _values(m.rows, "proto")[1]
    if len(port) and (port.max() > 0xFFFF or proto.max() > 0xFF or min(port.min(), proto.min()) < -1):
        raise DataError("a flow has a port beyond 65535 or a protocol beyond 255; ingest its capture again")
    keys, counts = _count(group << 26 | (proto + 1) << 17 | (port + 1))
    group = keys >> 26
    code = keys & (1 << 26) - 1
    picked, offsets = _top(group, counts, code, m.size, TOP)
    total = np.bincount(group, weights=counts, minlength=m.size)
    share = counts[picked] / total[group[picked]]
    number = (code[picked] & (1 << 17) - 1) - 1
    fields = [
        pa.array(((code[picked] >> 17) - 1).astype(np.int16)),
        pa.array(number.astype(np.int32), mask=number == schema.MISSING),
        pa.array(share, pa.float64()),
    ]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(schema.PORT)))


def _labels(m: _Members) -> dict[str, pa.Array]:
    """Columns `labels`, those with the most sources, and `labelled`."""
    labels, labelled = _names(m.group, m.src, m.rows["label"], m.size, schema.LABEL)
    return {"labels": labels, "labelled": labelled}


def _scanners(m: _Members, known: Scanners | None) -> dict[str, pa.Array]:
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
    numbers, group = np.unique(_numpy(clusters["cluster"]), return_inverse=True)
    pairs = np.unique(_pack(group.astype(np.int64), _numpy(clusters["src"])))
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
    pairs, pair = np.unique(_pack(group[known], src[known]), return_inverse=True)
    triples = np.unique(pair * n_names + code[known])  # a source may carry several names
    keys, counts = _count((pairs[triples // n_names] >> 32) * n_names + triples % n_names)
    picked, offsets = _top(keys // n_names, counts, keys, size, TOP)
    fields = [names.take(pa.array(keys[picked] % n_names)), pa.array(counts[picked])]
    listed = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(item)))
    return listed, np.bincount(pairs >> 32, minlength=size)


def _share(m: _Members, name: str) -> pa.Array:
    """Share of flows with a fingerprint, over the sequences that record it; null where none does."""
    column = m.rows[name]
    known = column.is_valid().to_numpy()
    weight = _numpy(m.rows["length"]) * known
    share = pc.fill_null(column, 0).to_numpy().astype(np.float64)
    total = np.bincount(m.group, weights=weight, minlength=m.size)
    with_it = np.bincount(m.group, weights=weight * share, minlength=m.size)
    return pa.array(with_it / np.maximum(total, 1), mask=total == 0)


def _destinations(m: _Members) -> pa.Array:
    group, dst = _grouped(m, "dst")
    known = dst != schema.MISSING
    count = _distinct(group[known], dst[known], m.size)
    return pa.array(count, mask=count == 0)


def _median_gap(m: _Members) -> pa.Array:
    """Median gap in µs, rounded down; the first flow of a sequence has no gap and does not count."""
    row, gap = _values(m.rows, "gap_us")
    inner = np.diff(row, prepend=-1) == 0
    group, gap = _sort_within(m.group[row[inner]], gap[inner])
    count = np.bincount(group, minlength=m.size)
    start = np.cumsum(count) - count
    last = max(len(gap) - 1, 0)
    low, high = (np.clip(start + middle, 0, last) for middle in ((count - 1) // 2, count // 2))
    median = (gap[low] + gap[high]) // 2 if len(gap) else np.zeros(m.size, np.int64)
    return pa.array(median, mask=count == 0)


def _cohesion(clusters: pa.Table, m: _Members) -> pa.Array:
    group = np.searchsorted(m.clusters, _numpy(clusters["cluster"]))
    weight = np.bincount(group, weights=_numpy(clusters["weight_own"]), minlength=m.size)
    others = m.sequences_of - 1
    return pa.array(weight / np.maximum(m.sequences_of * others, 1), mask=others == 0)


def _extreme(choose: np.ufunc, m: _Members, name: str) -> Ints:
    """Smallest (np.minimum) or largest (np.maximum) time of each cluster, µs."""
    times = _micros(m.rows[name])
    order = np.argsort(m.group, kind="stable")
    return np.asarray(choose.reduceat(times[order], np.cumsum(m.sequences_of) - m.sequences_of))


# ---------------------------------------------------------------------------------------------
# Counting by sorting packed keys
# ---------------------------------------------------------------------------------------------


def _numpy(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.to_numpy()).astype(np.int64 if pa.types.is_integer(column.type) else float)


def _micros(column: pa.ChunkedArray) -> Ints:
    return _numpy(column.cast(pa.int64()))


def _pack(group: Ints, value: Ints) -> Ints:
    """Keys (group, value) for values below 2^32."""
    return group << 32 | value


def _count(keys: Ints) -> tuple[Ints, Ints]:
    """Ascending distinct keys, and how often each occurs."""
    keys = np.sort(keys)
    first = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
    return keys[first], np.diff(first, append=len(keys))


def _distinct(group: Ints, value: Ints, size: int) -> Ints:
    """Distinct values (0 to 2^32 - 1) in each of `size` groups."""
    return np.bincount(_count(_pack(group, value))[0] >> 32, minlength=size)


def _top(group: Ints, count: Ints, code: Ints, size: int, k: int) -> tuple[Ints, pa.Array]:
    """Positions of the k largest counts of each group (ties: smaller code), and offsets of the groups."""
    order = np.lexsort((code, -count, group))
    sizes = np.bincount(group, minlength=size)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    offsets = np.concatenate([[0], np.cumsum(np.minimum(sizes, k))])
    return order[place < k], pa.array(offsets, pa.int32())


def _sort_within(group: Ints, value: Ints) -> tuple[Ints, Ints]:
    """Both arrays sorted by group, then value (>= 0): in one key if it fits into 63 bits, else slower."""
    bits = int(value.max()).bit_length() if len(value) else 0
    if len(group) and int(group.max()).bit_length() + bits > 63:
        order = np.lexsort((value, group))
        return group[order], value[order]
    keys = np.sort(group << bits | value)
    return keys >> bits, keys & (1 << bits) - 1
