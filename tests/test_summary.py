"""Summaries of clusters against hand-computed numbers and a plain-Python formulation of the same."""

from __future__ import annotations

import statistics
from collections import Counter
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_example import START_US, cluster_table, sequence, sequence_table, telescope

from rayscan import schema
from rayscan.captures.scanners import Scanners
from rayscan.errors import DataError
from rayscan.report.summary import ACTIVITY, DAY_US, SUMMARY, activity, summarise, usual_port

A, B, C = 0x0A000001, 0x0A0000FF, 0xFFFFFFFF  # A and B share a /24


def _small() -> tuple[pa.Table, pa.Table]:
    rows = [
        sequence(
            10,
            A,
            dst_port=[23, 23, 80],
            proto=[6, 6, 6],
            dst=[1, 1, 2],
            gap_us=[0, 4, 10],
            label="x",
            zmap=1.0,
        ),
        sequence(11, B, dst_port=[23, 53], proto=[6, 17], dst=[2, 3], gap_us=[0, 7], start=START_US - 5),
        sequence(12, C, dst_port=[8, -1], proto=[1, 47], dst=[-1, -1], gap_us=[0, 2], label="y"),
        sequence(13, A, dst_port=[8], proto=[1], dst=[9], gap_us=[0], label="x", zmap=0.0),
    ]
    return sequence_table(rows), cluster_table([13, 12, 11, 10], [7, 3, 3, 3], [0.0, 0.2, 0.4, 0.9])


def test_a_small_period_by_hand() -> None:
    first, second = summarise(*_small(), "2024-03").to_pylist()
    assert (first["cluster"], first["sequences"], first["sources"], first["networks"]) == (3, 3, 3, 2)
    assert (first["flows"], first["destinations"], first["labelled"]) == (7, 3, 2)
    shares = [(p["proto"], p["port"], round(p["share"] * 7)) for p in first["ports"]]
    assert shares == [(6, 23, 3), (1, 8, 1), (6, 80, 1), (17, 53, 1), (47, None, 1)]
    assert first["labels"] == [{"label": "x", "sources": 1}, {"label": "y", "sources": 1}]
    assert first["zmap"] == 1.0 and first["mirai"] is None
    assert first["median_gap_us"] == (4 + 7) // 2
    assert first["cohesion"] == pytest.approx((0.2 + 0.4 + 0.9) / 2 / 3)
    assert first["examples"] == [A, B, C]
    assert first["first"].timestamp() * 1e6 == pytest.approx(START_US - 5, abs=0.5)
    assert (first["last"] - first["first"]).microseconds == 19
    assert (second["cluster"], second["sequences"], second["flows"]) == (7, 1, 1)
    assert second["median_gap_us"] is None and second["cohesion"] is None and second["zmap"] == 0.0


def _reference(rows: list[dict[str, Any]], weights: list[float]) -> dict[str, Any]:
    """One cluster, one row at a time."""
    flows: Counter[int] = Counter()
    ports = Counter(pair for r in rows for pair in zip(r["proto"], r["dst_port"], strict=True))
    for r in rows:
        flows[r["src"]] += r["length"]
    pairs = {(r["label"], r["src"]) for r in rows if r["label"]}
    labels = Counter(label for label, _ in pairs)
    gaps = [gap for r in rows for gap in r["gap_us"][1:]]
    total = sum(flows.values())
    return {
        "sequences": len(rows),
        "sources": len(flows),
        "networks": len({src // 256 for src in flows}),
        "flows": total,
        "first": min(r["start"] for r in rows),
        "last": max(r["end"] for r in rows),
        "ports": [
            {"proto": proto, "port": port, "share": n / total}
            for (proto, port), n in sorted(ports.items(), key=lambda item: (-item[1], item[0]))[:5]
        ],
        "labels": [
            {"label": label, "sources": n}
            for label, n in sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:5]
        ],
        "labelled": len({src for _, src in pairs}),
        "destinations": len({dst for r in rows for dst in r["dst"]}),
        "median_gap_us": int(statistics.median(gaps) // 1),
        "examples": sorted(flows, key=lambda src: (-flows[src], src))[:20],
        "mirai": pytest.approx(sum(r["mirai"] * r["length"] for r in rows) / total, rel=1e-5),
        "cohesion": pytest.approx(np.mean(weights) / (len(rows) - 1)) if len(rows) > 1 else None,
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_a_row_by_row_formulation(seed: int) -> None:
    sequences, clusters = telescope(seed)
    got = summarise(sequences, clusters, "all").to_pylist()
    members: dict[int, tuple[list[dict[str, Any]], list[float]]] = {}
    weight = dict(zip(clusters["sequence_id"].to_pylist(), clusters["weight_own"].to_pylist(), strict=True))
    cluster = dict(zip(clusters["sequence_id"].to_pylist(), clusters["cluster"].to_pylist(), strict=True))
    for row in sequences.to_pylist():
        rows, weights = members.setdefault(cluster[row["sequence_id"]], ([], []))
        rows.append(row)
        weights.append(weight[row["sequence_id"]])
    assert [item["cluster"] for item in got] == sorted(members)
    for item in got:
        expected = _reference(*members[item["cluster"]])
        assert {key: item[key] for key in expected} == expected


def test_order_of_rows_does_not_matter() -> None:
    sequences, clusters = telescope(3)
    order = np.random.default_rng(0).permutation(sequences.num_rows)
    again = summarise(sequences.take(order), clusters.take(order[::-1]), "p").to_pylist()
    for one, other in zip(summarise(sequences, clusters, "p").to_pylist(), again, strict=True):
        for floating in ("cohesion", "mirai", "zmap"):  # sums of another order
            assert one.pop(floating) == pytest.approx(other.pop(floating))
        assert one == other


def test_chunks_do_not_matter() -> None:
    sequences, clusters = telescope(3)
    chunked = pa.concat_tables([sequences.slice(0, 100), sequences.slice(100, 7), sequences.slice(107)])
    assert summarise(chunked, clusters, "p").equals(summarise(sequences, clusters, "p"))


def test_empty_tables_give_empty_tables() -> None:
    nothing = schema.SEQUENCES.empty_table(), schema.CLUSTERS.empty_table()
    assert summarise(*nothing, "p").equals(SUMMARY.empty_table())
    assert activity(*nothing, "p").equals(ACTIVITY.empty_table())
    assert len(usual_port(nothing[0])) == 0


def test_sequences_without_a_cluster_are_left_out() -> None:
    sequences, clusters = _small()
    kept = summarise(sequences, clusters.filter(pa.array([False, True, True, True])), "p")
    assert kept.to_pylist() == summarise(sequences, clusters, "p").to_pylist()[:1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([10, 99], "clustered sequence 99 is missing from"),
        ([10, 10], "sequence 10 is in two clusters"),
    ],
)
def test_clusters_that_do_not_fit_are_named(ids: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        summarise(_small()[0], cluster_table(ids, [0, 1]), "p")


def test_a_sequence_given_twice_is_named() -> None:
    sequences, clusters = _small()
    with pytest.raises(DataError, match="12 is more than once in"):
        summarise(pa.concat_tables([sequences, sequences.slice(2, 1)]), clusters, "p")


def test_impossible_ports_are_refused() -> None:
    sequences = sequence_table([sequence(1, A, dst_port=[23, 70_000])])
    with pytest.raises(DataError, match="beyond 65535"):
        summarise(sequences, cluster_table([1], [0]), "p")


def test_what_is_not_recorded_is_null() -> None:
    sequences = sequence_table([sequence(1, A, dst=[-1, -1], dst_port=[-1, -1]), sequence(2, B, dst=None)])
    row = summarise(sequences, cluster_table([1, 2], [0, 0]), "p").to_pylist()[0]
    assert row["destinations"] is None and row["labels"] == [] and row["labelled"] == 0
    assert [row[name] for name in schema.FINGERPRINTS] == [None] * 3
    assert row["ports"][0] == {"proto": 6, "port": None, "share": 0.5}


def test_medians_of_gaps_too_wide_for_one_key() -> None:
    wide = 1 << 61
    rows = [sequence(i, A + i, gap_us=[0, gap]) for i, gap in enumerate((wide, 3, wide + 2, 5, 9))]
    summary = summarise(sequence_table(rows), cluster_table([0, 1, 2, 3, 4], [0, 5, 0, 5, 5]), "p")
    assert summary["median_gap_us"].to_pylist() == [wide + 1, 5]


def test_activity_counts_every_flow_on_its_day() -> None:
    hour = DAY_US // 24
    rows = [
        sequence(1, A, start=START_US + 23 * hour, gap_us=[0, 2 * hour, 24 * hour]),
        sequence(2, B, start=START_US, gap_us=[0, 0]),
        sequence(3, B, start=START_US - 1, gap_us=[0, 1]),
    ]
    table = activity(sequence_table(rows), cluster_table([1, 2, 3], [4, 4, 9]), "2024-03", top=1)
    days = [(r["cluster"], r["start"].strftime("%m-%d"), r["flows"]) for r in table.to_pylist()]
    assert days == [(4, "03-01", 3), (4, "03-02", 1), (4, "03-03", 1), (None, "02-29", 1), (None, "03-01", 1)]


@pytest.mark.parametrize(("top", "step_us"), [(2, DAY_US), (100, DAY_US // 24)])
def test_activity_loses_no_flow(top: int, step_us: int) -> None:
    sequences, clusters = telescope(2)
    table = activity(sequences, clusters, "p", top=top, step_us=step_us)
    assert sum(table["flows"].to_pylist()) == sum(sequences["length"].to_pylist())
    assert len(table["cluster"].drop_null().unique()) == min(top, len(clusters["cluster"].unique()))
    assert set(np.array(table["start"].cast(pa.int64())) % step_us) == {0}


def test_activity_shows_the_clusters_with_the_most_sources() -> None:
    table = activity(*telescope(2), "p", top=3)
    assert table["cluster"].drop_null().unique().to_pylist() == [0, 1, 3]


def test_usual_port() -> None:
    rows = [
        sequence(1, A, dst_port=[80, 23, 80]),
        sequence(2, A, dst_port=[443, 22]),
        sequence(3, A, dst_port=[-1, -1]),
        sequence(4, A, dst_port=None),
        sequence(5, A, dst_port=[-1, 0]),
    ]
    assert usual_port(sequence_table(rows)).to_pylist() == [80, 22, None, None, 0]


def test_known_scanners_of_a_cluster_by_hand() -> None:
    """A is known to one list on the day, B to an older one; C to one that is out of tolerance."""
    day = START_US // DAY_US
    rows = [(A, "a.example", day), (B, "b.example", day - 40), (C, "c.example", day - 400)]
    entries = [
        {"network": src, "length": 32, "organisation": who, "kind": "scanner", "source": "s",
         "valid_from": date(1970, 1, 1) + timedelta(on), "valid_to": date(1970, 1, 1) + timedelta(on)}
        for src, who, on in rows
    ]  # fmt: skip
    known = Scanners(pa.Table.from_pylist(entries, schema.SCANNERS), 100)
    first, second = summarise(*_small(), "2024-03", known).to_pylist()
    assert first["scanners"] == [
        {"organisation": "a.example", "sources": 1}, {"organisation": "b.example", "sources": 1}
    ]  # fmt: skip
    assert (first["known"], first["days_off"]) == (2, 39)  # its sequence begins 5 µs before the day
    assert (second["scanners"], second["known"], second["days_off"]) == (
        [{"organisation": "a.example", "sources": 1}], 1, 0
    )  # fmt: skip
    nobody = summarise(*_small(), "2024-03", Scanners(schema.SCANNERS.empty_table(), 100)).to_pylist()
    assert [(row["scanners"], row["known"], row["days_off"]) for row in nobody] == [([], 0, None)] * 2
    unasked = summarise(*_small(), "2024-03").to_pylist()
    assert [(row["scanners"], row["known"], row["days_off"]) for row in unasked] == [(None, None, None)] * 2
