"""Clustered sequences and how they are counted: what summaries and details of clusters share.

Each count is one sort of packed 64-bit keys, (cluster, value): 10^7 flows and 10^5 clusters take seconds. The
price is memory, some 40 bytes per flow of one period at the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan import schema
from rayscan.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Members:
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
        return as_numpy(self.rows["src"])


def join(sequences: pa.Table, clusters: pa.Table) -> Members:
    ids = as_numpy(clusters["sequence_id"])
    numbers, group, members = np.unique(
        as_numpy(clusters["cluster"]), return_inverse=True, return_counts=True
    )
    order = np.argsort(ids)
    ids, group = ids[order], group[order]
    if (ids[1:] == ids[:-1]).any():
        raise DataError(f"sequence {ids[1:][ids[1:] == ids[:-1]][0]} is in two clusters of one period")
    wanted = as_numpy(sequences["sequence_id"])
    at = np.minimum(np.searchsorted(ids, wanted), max(len(ids) - 1, 0))
    found = ids[at] == wanted if len(ids) else np.zeros(len(wanted), bool)
    _check_complete(ids, at[found])
    rows = sequences if found.all() else sequences.filter(pa.array(found))
    return Members(rows, group[at[found]].astype(np.int64), numbers, members.astype(np.int64))


def _check_complete(ids: Ints, at: Ints) -> None:
    seen = np.bincount(at, minlength=len(ids))
    if (seen != 1).any():
        bad = int(np.flatnonzero(seen != 1)[0])
        what = "missing from" if seen[bad] == 0 else "more than once in"
        raise DataError(
            f"clustered sequence {ids[bad]} is {what} the sequences of the period; "
            "cluster again, from the sequences that are there now"
        )


def values(rows: pa.Table, name: str) -> tuple[Ints, Ints]:
    """For each flow the position of its sequence, and its value: int64, MISSING where unrecorded."""
    column = rows[name]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    flat = pc.list_flatten(column)
    flat = pc.fill_null(flat, schema.MISSING) if flat.null_count else flat
    return np.repeat(np.arange(len(lengths)), lengths), flat.to_numpy().astype(np.int64, copy=False)


def grouped(m: Members, name: str) -> tuple[Ints, Ints]:
    """The same, with the cluster's position in place of the sequence's."""
    row, value = values(m.rows, name)
    return m.group[row], value


def rank_of(m: Members, top: int) -> Ints:
    """Rank of each cluster by sources, then sequences, then number; `top` for all further ones."""
    sources = distinct(m.group, m.src, m.size)
    order = np.lexsort((m.clusters, -m.sequences_of, -sources))
    rank = np.full(m.size, top, np.int64)
    rank[order[:top]] = np.arange(min(top, m.size))
    return rank


def flow_times(m: Members) -> tuple[Ints, Ints]:
    """For each flow the position of its sequence, and its time in µs."""
    row, gap = values(m.rows, "gap_us")
    return row, micros(m.rows["start"])[row] + _running_sum(row, gap)


def _running_sum(row: Ints, gap: Ints) -> Ints:
    """Sum of the gaps since the first flow of each sequence; `row` is ascending."""
    total = np.cumsum(gap)
    if not len(total):
        return total
    first = np.flatnonzero(np.diff(row, prepend=row[0] - 1))
    return total - np.repeat(total[first], np.diff(first, append=len(row)))


# ---------------------------------------------------------------------------------------------
# Counting by sorting packed keys
# ---------------------------------------------------------------------------------------------


def as_numpy(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.to_numpy()).astype(np.int64 if pa.types.is_integer(column.type) else float)


def micros(column: pa.ChunkedArray) -> Ints:
    return as_numpy(column.cast(pa.int64()))


def pack(group: Ints, value: Ints) -> Ints:
    """Keys (group, value) for values below 2^32."""
    return group << 32 | value


def count_of(keys: Ints) -> tuple[Ints, Ints]:
    """Ascending distinct keys, and how often each occurs."""
    keys = np.sort(keys)
    first = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
    return keys[first], np.diff(first, append=len(keys))


def distinct(group: Ints, value: Ints, size: int) -> Ints:
    """Distinct values (0 to 2^32 - 1) in each of `size` groups."""
    return np.bincount(count_of(pack(group, value))[0] >> 32, minlength=size)


def top_of(group: Ints, count: Ints, code: Ints, size: int, k: int) -> tuple[Ints, pa.Array]:
    """Positions of the k largest counts of each group (ties: smaller code), and offsets of the groups."""
    order = np.lexsort((code, -count, group))
    sizes = np.bincount(group, minlength=size)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    offsets = np.concatenate([[0], np.cumsum(np.minimum(sizes, k))])
    return order[place < k], pa.array(offsets, pa.int32())


def sort_within(group: Ints, value: Ints) -> tuple[Ints, Ints]:
    """Both arrays sorted by group, then value (>= 0): in one key if it fits into 63 bits, else slower."""
    bits = int(value.max()).bit_length() if len(value) else 0
    if len(group) and int(group.max()).bit_length() + bits > 63:
        order = np.lexsort((value, group))
        return group[order], value[order]
    keys = np.sort(group << bits | value)
    return keys >> bits, keys & (1 << bits) - 1
