"""Sequences against a slow reference in plain Python, hand-made cases, and invariances."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan import schema, sequences
from rayscan.errors import DataError, SchemaError
from rayscan.sequences import Dropped, build

T0 = 1_700_000_000_000_000
OPTIONAL = ("ttl", "size", "tcp_flags", "src_port", "icmp_code")
FIELDS = ("ts", "src", "dst", "dst_port", "proto", *OPTIONAL, "fingerprint", "label")


def table(rows: list[dict], names: tuple[str, ...] = FIELDS) -> pa.Table:
    columns = {
        name: pa.array(
            [row.get(name) for row in rows], pa.int64() if name == "ts" else schema.FLOWS.field(name).type
        )
        for name in names
    }
    columns["ts"] = columns["ts"].cast(schema.TIME)
    return pa.table(columns)


def flow(src: int, ts: int, **more: object) -> dict:
    return {"src": src, "ts": T0 + ts, "dst": 1, "dst_port": 23, "proto": 6} | more


def us(times: pa.ChunkedArray) -> list[int]:
    return times.cast(pa.int64()).to_pylist()


def reference(rows: list[dict], length: int, min_length: int) -> tuple[list[dict], Dropped]:
    """The definition, one flow at a time."""
    by_source = defaultdict(list)
    for row in rows:
        by_source[row["src"]].append(row)
    recorded = {n: any(row.get(n) is not None for row in rows) for n in ("dst", *OPTIONAL)}
    for name, protocols in (("tcp_flags", {6}), ("src_port", {6, 17}), ("icmp_code", {1})):
        recorded[name] |= not any(row["proto"] in protocols for row in rows)
    out, dropped_flows, dropped_sources = [], 0, 0
    for src in sorted(by_source):
        ordered = sorted(by_source[src], key=lambda row: row["ts"])
        windows = [ordered[i : i + length] for i in range(0, len(ordered), length)]
        if len(windows[-1]) < min_length:
            dropped_flows += len(windows.pop())
        dropped_sources += not windows
        for index, window in enumerate(windows):
            expect = {"src": src, "index": index, "sequences": len(windows), "length": len(window)}
            expect |= {"start": window[0]["ts"], "end": window[-1]["ts"]}
            for name in ("dst", "dst_port", "proto", *OPTIONAL):
                values = [-1 if row.get(name) is None else row[name] for row in window]
                expect[name] = values if recorded.get(name, True) else None
            times = [row["ts"] for row in window]
            expect["gap_us"] = [0, *(b - a for a, b in pairwise(times))]
            bits = [row["fingerprint"] for row in window if row.get("fingerprint") is not None]
            for name, bit in schema.FINGERPRINTS.items():
                share = sum(bool(b & bit) for b in bits) / len(bits) if bits else None
                expect[name] = None if share is None else float(np.float32(share))
            counts = Counter(row["label"] for row in window if row.get("label") is not None)
            expect["label"] = min(counts, key=lambda k: (-counts[k], k)) if counts else None
            out.append(expect)
    return out, Dropped(dropped_flows, dropped_sources)


def rows_of(result: pa.Table) -> list[dict]:
    rows = result.drop_columns(["start", "end"]).to_pylist()
    for row, start, end in zip(rows, us(result["start"]), us(result["end"]), strict=True):
        row |= {"start": start, "end": end}
        del row["sequence_id"]
    return rows


def maybe(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values


FLOW = st.fixed_dictionaries(
    {
        "src": st.sampled_from([0, 1, 2, 65_535, 65_536, 65_537, 2**31, 2**32 - 1]),
        "ts": st.integers(T0, T0 + 30) | st.sampled_from([0, T0 + 2**40]),
        "dst": maybe(st.integers(0, 2**32 - 1)),
        "dst_port": maybe(st.integers(0, 65_535)),
        "proto": st.sampled_from([1, 6, 17]),
        "ttl": maybe(st.integers(0, 255)),
        "size": maybe(st.integers(0, 2**40)),
        "tcp_flags": maybe(st.integers(0, 255)),
        "src_port": maybe(st.integers(0, 65_535)),
        "icmp_code": maybe(st.integers(0, 255)),
        "fingerprint": maybe(st.integers(0, 7)),
        "label": maybe(st.sampled_from(["a", "b", "ä", "Z"])),
    }
)


@settings(max_examples=80, deadline=None)
@given(st.lists(FLOW, max_size=60), st.integers(1, 7), st.data())
def test_agrees_with_the_definition(rows: list[dict], length: int, data: st.DataObject) -> None:
    min_length = data.draw(st.integers(1, length))
    optional = ["dst", *OPTIONAL, "fingerprint", "label"]
    unrecorded = data.draw(st.sets(st.sampled_from(optional)))
    rows = [{k: (None if k in unrecorded else v) for k, v in row.items()} for row in rows]
    result, dropped = build(table(rows), length, min_length)
    expect, expect_dropped = reference(rows, length, min_length)
    assert result.schema.equals(schema.SEQUENCES)
    assert rows_of(result) == expect
    assert dropped == expect_dropped
    assert sum(result["length"].to_pylist()) + dropped.flows == len(rows)
    result.validate(full=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(FLOW, max_size=40, unique_by=lambda row: row["ts"]), st.randoms())
def test_row_order_does_not_matter_when_times_differ(rows: list[dict], random) -> None:
    shuffled = random.sample(rows, len(rows))
    assert build(table(rows), 4, 2)[0].equals(build(table(shuffled), 4, 2)[0])


@settings(max_examples=40, deadline=None)
@given(st.lists(FLOW, max_size=40), st.integers(0, 40))
def test_chunks_do_not_matter(rows: list[dict], cut: int) -> None:
    whole = table(rows)
    parts = pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])
    assert build(whole, 4, 2)[0].equals(build(parts, 4, 2)[0])


def test_equal_times_keep_the_order_of_the_rows() -> None:
    rows = [flow(7, 0, dst_port=p) for p in (5, 3, 9, 1)] + [flow(7, -1, dst_port=4)]
    assert build(table(rows), 8, 1)[0]["dst_port"].to_pylist() == [[4, 5, 3, 9, 1]]


def test_windows_by_hand() -> None:
    rows = [flow(9, t) for t in range(7)] + [flow(3, 10 * t) for t in range(5)] + [flow(4, 0)]
    result, dropped = build(table(rows), 3, 2)
    assert result["src"].to_pylist() == [3, 3, 9, 9]
    assert result["index"].to_pylist() == [0, 1, 0, 1]
    assert result["sequences"].to_pylist() == [2, 2, 2, 2]
    assert result["length"].to_pylist() == [3, 2, 3, 3]
    assert result["gap_us"].to_pylist() == [[0, 10, 10], [0, 10], [0, 1, 1], [0, 1, 1]]
    assert dropped == Dropped(flows=2, sources=1)  # the seventh flow of 9, and source 4


def test_gaps_of_one_microsecond_survive_fifty_years() -> None:
    result, _ = build(table([flow(1, 0), flow(1, 1), flow(1, 50 * 365 * 86_400 * 10**6)]), 4, 1)
    assert result["gap_us"].to_pylist() == [[0, 1, 50 * 365 * 86_400 * 10**6 - 1]]


def test_optional_columns_may_be_absent() -> None:
    required = ("ts", "src", "dst_port", "proto")
    result, _ = build(table([flow(1, 0), flow(1, 1)], required), 2, 1)
    assert result["dst"].to_pylist() == [None]
    for name in ("ttl", "size", "tcp_flags", "src_port", "zmap", "masscan", "mirai", "label"):
        assert result[name].null_count == 1
    assert result["icmp_code"].to_pylist() == [[-1, -1]]  # of TCP: not unrecorded


def test_no_flows_give_no_sequences() -> None:
    for result, _ in (build(table([]), 4, 2), build(table([flow(1, 0)]), 4, 2)):
        assert result.num_rows == 0
        assert result.schema.equals(schema.SEQUENCES)
    assert build(table([flow(1, 0)]), 4, 2)[1] == Dropped(1, 1)


def test_ids_depend_on_source_start_and_index_alone() -> None:
    rows = [flow(s, t) for s in (1, 2) for t in range(4)]
    ids, _ = build(table(rows), 2, 1)
    other, _ = build(table([row | {"dst": 9, "proto": 17} for row in rows if row["src"] == 2]), 2, 1)
    assert ids["sequence_id"].to_pylist()[2:] == other["sequence_id"].to_pylist()
    assert len(set(ids["sequence_id"].to_pylist())) == 4
    assert min(ids["sequence_id"].to_pylist()) >= 0
    later, _ = build(table([row | {"ts": row["ts"] + 1} for row in rows]), 2, 1)
    assert not set(later["sequence_id"].to_pylist()) & set(ids["sequence_id"].to_pylist())


def test_equal_ids_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "hash64", lambda values: np.zeros(len(values), np.uint64))
    with pytest.raises(DataError, match="same id"):
        build(table([flow(1, 0), flow(2, 0)]), 2, 1)


def test_bad_tables() -> None:
    good = table([flow(1, 0)])
    with pytest.raises(SchemaError, match="flows lack dst_port; there are"):
        build(good.drop_columns(["dst_port"]), 2, 1)
    with pytest.raises(DataError, match="1 flows have no src"):
        build(table([flow(1, 0) | {"src": None}]), 2, 1)
    with pytest.raises(DataError, match="negative src"):
        build(table([flow(-1, 0)]), 2, 1)
    with pytest.raises(ValueError, match="min_length"):
        build(good, 2, 3)


def test_more_flows_than_list_offsets_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "MAX_FLOWS", 1)
    with pytest.raises(DataError, match=r"2 flows .* more than 1: raise ingest\.n_buckets"):
        build(table([flow(1, 0), flow(1, 1)]), 2, 1)


@pytest.mark.data
@pytest.mark.skipif("RAYSCAN_DATA" not in os.environ, reason="RAYSCAN_DATA is not set")
def test_real_sources() -> None:
    """Published counts of the honeypot capture: sources with at least 32 and 128 records."""
    marx = pq.read_table(Path(os.environ["RAYSCAN_DATA"]) / "flows" / "marx.parquet")
    marx = marx.rename_columns({"src_ip": "src", "dst_ip": "dst"})
    result, dropped = build(marx, 128, 32)
    assert len(set(result["src"].to_pylist())) == 1_467
    full = result.filter(pa.compute.equal(result["length"], 128))
    assert len(set(full["src"].to_pylist())) == 262
    assert sum(result["length"].to_pylist()) + dropped.flows == marx.num_rows
    assert dropped.sources == 69_602 - 1_467
