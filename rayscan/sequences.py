"""Flows of one period and bucket -> sequences.

Per source the flows are put in time order and cut into consecutive windows. A bucket holds all flows of its
sources, so nothing beyond the table at hand is needed, and nothing here knows where it came from.

The order comes from a stable sort by time followed by a radix sort of the source's 16-bit digits: 1.6 to 2.4
times as fast as `np.lexsort`, and linear where the flows of each capture are in time order already. The
price is memory: beside the flows, one 8-byte position per flow and a copy of each column while it is
gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan.errors import DataError, SchemaError
from rayscan.keys import hash64
from rayscan.schema import FINGERPRINTS, MISSING, SEQUENCE_LISTS, SEQUENCES, TIME

MAX_FLOWS = 2**31 - 1
"""Most flows of one table: list offsets are int32, in Arrow as in Delta."""

_REQUIRED = ("ts", "src", "dst_port", "proto")
_OPTIONAL_LISTS = ("dst", "ttl", "size", "tcp_flags", "src_port", "icmp_code")
_ONLY_OF = {"tcp_flags": (6,), "src_port": (6, 17), "icmp_code": (1,)}
"""Protocols of the flows that can have the column. Where there are none, it is not unrecorded, but empty."""

Ints = NDArray[np.int64]


class Dropped(NamedTuple):
    """What is in no sequence: flows, and sources that have no sequence at all."""

    flows: int
    sources: int


@dataclass(frozen=True)
class _Windows:
    """Cut of T sources with N sorted flows into M windows that hold K flows."""

    row: Ints  # (K,) position in the input of each flow that is kept, in output order
    start: Ints  # (M + 1,) where each window begins among the kept flows
    source_row: Ints  # (M,) position in the input of a flow of the window's source
    index: Ints  # (M,) 0, 1, ... within the source
    siblings: Ints  # (M,) windows of the same source
    dropped: Dropped


def build(flows: pa.Table, length: int, min_length: int) -> tuple[pa.Table, Dropped]:
    """Sequences of the flows (`schema.SEQUENCES`, sorted by src and index), and what is in none.

    `flows` has the columns of `schema.FLOWS` in any row order; `capture`, `sensor` and the like are not
    needed, and an optional column that is absent counts as unrecorded. Flows of a source with equal times
    keep the order of the rows. Windows hold `length` flows; the last one of a source is kept from
    `min_length` flows on. `gap_us` is the time since the flow before, 0 for the first of a sequence. No
    flows give no sequences.

    Raises SchemaError where a column is missing, and DataError where ts, src or proto is null or src
    negative, above 2^31 - 1 flows, or if two sequences should get the same id.
    """
    if not 1 <= min_length <= length:
        raise ValueError(f"need 1 <= min_length <= length, got {min_length} and {length}")
    _check(flows)
    src, ts = _ints(flows, "src"), _ints(flows, "ts")
    if src.min(initial=0) < 0:
        raise DataError(f"{(src < 0).sum():,} flows have a negative src")
    windows = _cut(src, _order(src, ts), length, min_length)
    columns = _keys(src, ts, windows) | _lists(flows, ts, windows)
    columns |= _shares(flows, windows) | {"label": _labels(flows, windows)}
    table = pa.Table.from_arrays([columns[name] for name in SEQUENCES.names], schema=SEQUENCES)
    return table, windows.dropped


def _check(flows: pa.Table) -> None:
    absent = [name for name in _REQUIRED if name not in flows.column_names]
    if absent:
        raise SchemaError(f"flows lack {', '.join(absent)}; there are {', '.join(flows.column_names)}")
    if flows.num_rows > MAX_FLOWS:
        raise DataError(
            f"{flows.num_rows:,} flows in one period and bucket, more than {MAX_FLOWS:,}: raise"
            " ingest.n_buckets"
        )
    for name in ("ts", "src", "proto"):
        if flows.column(name).null_count:
            raise DataError(f"{flows.column(name).null_count:,} flows have no {name}")


def _ints(flows: pa.Table, name: str) -> Ints:
    """A column as int64, shape (N,); times in microseconds, nulls as MISSING, all MISSING if absent."""
    if name not in flows.column_names:
        return np.full(flows.num_rows, MISSING, np.int64)
    column = flows.column(name)
    if pa.types.is_timestamp(column.type):
        column = column.cast(TIME)
    values: Ints = pc.fill_null(column.cast(pa.int64()), MISSING).to_numpy()
    return values


def _order(src: Ints, ts: Ints) -> Ints:
    """Stable order by (src, ts), shape (N,)."""
    order = np.argsort(ts, kind="stable")  # timsort: linear on a few runs that are in order
    for shift in range(0, int(src.max(initial=0)).bit_length(), 16):
        digit = (src[order] >> shift).astype(np.uint16)
        order = order[np.argsort(digit, kind="stable")]  # of 16 bits: a radix sort
    return order


def _cut(src: Ints, order: Ints, length: int, min_length: int) -> _Windows:
    sorted_src = src[order]
    first = np.flatnonzero(np.r_[len(src) > 0, sorted_src[1:] != sorted_src[:-1]][: len(src)])
    flows = np.diff(np.r_[first, len(src)])
    rest = flows % length
    count = flows // length + (rest >= min_length)  # windows of each source
    source = np.repeat(np.arange(len(first)), count)
    index = np.arange(len(source)) - np.repeat(np.cumsum(count) - count, count)
    size = np.minimum(length, flows[source] - index * length)
    kept = np.where(rest >= min_length, flows, flows - rest)
    in_window = np.arange(len(src)) - np.repeat(first, flows) < np.repeat(kept, flows)
    dropped = Dropped(int((flows - kept).sum()), int((count == 0).sum()))
    start = np.r_[0, np.cumsum(size)]
    return _Windows(order[in_window], start, order[first[source]], index, count[source], dropped)


def _keys(src: Ints, ts: Ints, windows: _Windows) -> dict[str, pa.Array]:
    source, start, end = src[windows.source_row], windows.start[:-1], windows.start[1:]
    first, last = ts[windows.row[start]], ts[windows.row[end - 1]]
    return {
        "sequence_id": pa.array(_ids(source, first, windows.index)),
        "src": pa.array(source),
        "index": pa.array(windows.index, pa.int32()),
        "sequences": pa.array(windows.siblings, pa.int32()),
        "start": pa.array(first).cast(TIME),
        "end": pa.array(last).cast(TIME),
        "length": pa.array(end - start, pa.int32()),
    }


def _ids(src: Ints, start_us: Ints, index: Ints) -> Ints:
    """Ids in [0, 2^63): the chained hash of source, start and index, checked to be distinct."""
    ids = hash64(src)
    for part in (start_us, index):
        ids = hash64((ids ^ part.view(np.uint64)).view(np.int64))
    ids63 = (ids >> np.uint64(1)).view(np.int64)
    if len(np.unique(ids63)) < len(ids63):
        raise DataError(
            "two sequences have the same id: a hash collision; change ingest.n_buckets or the period"
        )
    return ids63


def _lists(flows: pa.Table, ts: Ints, windows: _Windows) -> dict[str, pa.Array]:
    offsets = pa.array(windows.start, pa.int32())
    lists: dict[str, pa.Array] = {}
    for name, kind in SEQUENCE_LISTS.items():
        if name in _OPTIONAL_LISTS and not (_recorded(flows, name) or _none_could(flows, name)):
            lists[name] = pa.nulls(len(windows.index), pa.list_(kind))
        else:
            values = _gaps(ts, windows) if name == "gap_us" else _ints(flows, name)[windows.row]
            lists[name] = pa.ListArray.from_arrays(offsets, pa.array(values, kind))
    return lists


def _recorded(flows: pa.Table, name: str) -> bool:
    return name in flows.column_names and flows.column(name).null_count < flows.num_rows


def _none_could(flows: pa.Table, name: str) -> bool:
    of = _ONLY_OF.get(name)
    return of is not None and not pc.any(pc.is_in(flows["proto"], pa.array(of))).as_py()


def _gaps(ts: Ints, windows: _Windows) -> Ints:
    time = ts[windows.row]
    gaps = np.diff(time, prepend=time[:1])
    gaps[windows.start[:-1]] = 0
    return gaps


def _shares(flows: pa.Table, windows: _Windows) -> dict[str, pa.Array]:
    """Share of the flows whose fingerprint is recorded that carry each bit; null where none is."""
    if not _recorded(flows, "fingerprint") or not len(windows.index):
        return {name: pa.nulls(len(windows.index), pa.float32()) for name in FINGERPRINTS}
    bits, start = _ints(flows, "fingerprint")[windows.row], windows.start[:-1]
    known = np.add.reduceat((bits != MISSING).astype(np.int32), start)
    shares = {}
    for name, bit in FINGERPRINTS.items():
        hits = np.add.reduceat(((bits != MISSING) & (bits & bit != 0)).astype(np.int32), start)
        share = (hits / np.maximum(known, 1)).astype(np.float32)
        shares[name] = pa.array(share, mask=known == 0)
    return shares


def _labels(flows: pa.Table, windows: _Windows) -> pa.Array:
    """The label most flows of a sequence carry; of equals the smallest in byte order; null if there is
    none."""
    if not _recorded(flows, "label") or not len(windows.index):
        return pa.nulls(len(windows.index), pa.string())
    labels = flows.column("label").cast(pa.string())
    names = pc.unique(labels.drop_null()).sort()
    code = pc.fill_null(pc.index_in(labels, names), MISSING)
    best = _modes(code.to_numpy()[windows.row], len(names), windows)
    return names.take(pa.array(best, mask=best == MISSING))


def _modes(code: NDArray[np.int32], codes: int, windows: _Windows) -> Ints:
    """Most frequent code of each window, the smallest of equals; MISSING where every flow has MISSING."""
    window = np.repeat(np.arange(len(windows.index)), np.diff(windows.start))
    labelled = code != MISSING
    pair, count = np.unique(window[labelled] * codes + code[labelled], return_counts=True)
    window, value = np.divmod(pair, codes)
    rank = np.lexsort((value, -count, window))
    window, first = np.unique(window[rank], return_index=True)
    best = np.full(len(windows.index), MISSING, np.int64)
    best[window] = value[rank][first]
    return best
