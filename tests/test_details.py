"""What opens under a campaign, and how campaigns went, against row-by-row formulations of the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_example import START_US, cluster_table, sequence, sequence_table, telescope

from rayscan import schema
from rayscan.report import history, words
from rayscan.report.data import CAMPAIGNS
from rayscan.report.details import DETAILS, HOUR_US, details, nearest, nearest_to


def test_details_agree_with_a_row_by_row_formulation() -> None:
    sequences, clusters = telescope(1)
    found = details(sequences, clusters, "p", 4).to_pylist()
    cluster = dict(zip(clusters["sequence_id"].to_pylist(), clusters["cluster"].to_pylist(), strict=True))
    assert [row["cluster"] for row in found] == [0, 1, 2, 3]  # those with the most sources
    for item in found:
        rows = [row for row in sequences.to_pylist() if cluster[row["sequence_id"]] == item["cluster"]]
        hours: Counter[int] = Counter()
        for row in rows:
            times = int(row["start"].timestamp() * 1e6) + np.cumsum(row["gap_us"])
            hours.update(int(time) // HOUR_US % 24 for time in times)
        assert item["hours"] == [hours[hour] for hour in range(24)]
        sources = {row["src"] for row in rows}
        assert item["slash8"] == len({src >> 24 for src in sources})
        assert item["slash16"] == len({src >> 16 for src in sources})
        networks = Counter(src >> 16 << 16 for src in sources)
        assert {n["network"]: n["sources"] for n in item["networks16"]}.items() <= networks.items()
        targets = Counter(dst >> 8 << 8 for row in rows for dst in row["dst"])
        top = sorted(targets.items(), key=lambda pair: (-pair[1], pair[0]))[:6]
        assert [n["network"] for n in item["targets"]] == [network for network, _ in top]
        assert item["targets"][0]["share"] == pytest.approx(top[0][1] / targets.total())
        assert item["distinct_ports"] == len({p for row in rows for p in row["dst_port"]})
        assert len({said["src"] for said in item["said"]}) == 3


def test_the_most_typical_sequences_are_those_most_alike() -> None:
    rows = [sequence(i, src) for i, src in enumerate((7, 7, 8, 9, 10))]
    table = cluster_table([0, 1, 2, 3, 4], [0] * 5, [0.9, 0.8, 0.1, 0.5, 0.4])
    (found,) = details(sequence_table(rows), table, "p", 9)["said"].to_pylist()
    assert [said["src"] for said in found] == [7, 9, 10]  # each source once


def test_lone_sequences_and_nothing_have_no_details() -> None:
    rows = sequence_table([sequence(0, 1), sequence(1, 2)])
    assert details(rows, cluster_table([0, 1], [0, 1]), "p", 9).num_rows == 0
    empty = details(schema.SEQUENCES.empty_table(), schema.CLUSTERS.empty_table(), "p", 9)
    assert empty.equals(DETAILS.empty_table())


def test_nearest_is_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.standard_normal((n, 8)) for n in (3, 1, 5, 2, 4)]
    groups = [group / np.linalg.norm(group, axis=1, keepdims=True) for group in groups]
    sums, sizes = np.array([g.sum(axis=0) for g in groups]), np.array([float(len(g)) for g in groups])
    found = nearest(np.arange(10, 15), sums, sizes)
    for i, near in enumerate(found):
        mean = {10 + j: float((groups[i] @ groups[j].T).mean()) for j in range(5) if j != i}
        best = sorted(mean, key=lambda j: -mean[j])[:3]
        assert [one["cluster"] for one in near] == best
        assert [one["similarity"] for one in near] == pytest.approx([mean[j] for j in best])
    assert nearest(np.array([4]), sums[:1], sizes[:1]) == [[]]


def test_nearest_to_one_is_its_row_of_nearest() -> None:
    rng = np.random.default_rng(0)
    sums, sizes = rng.standard_normal((40, 8)), rng.integers(1, 9, 40).astype(float)
    for place, near in enumerate(nearest(np.arange(40), sums, sizes)):
        found = nearest_to(place, sums, sizes)
        assert [at for at, _ in found] == [one["cluster"] for one in near]
        assert [value for _, value in found] == pytest.approx([one["similarity"] for one in near])
    assert nearest_to(0, sums[:1], sizes[:1]) == []
    many = rng.standard_normal((100_000, 8))
    assert len(nearest_to(7, many, np.ones(100_000))) == 3  # all pairs would take minutes


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "2 flows within 10 microseconds from 2024-03-01 00:00:00 UTC, to 23/tcp, 2 destinations, "
             "usually 10 microseconds apart"),
        ({"dst_port": [23, 80], "dst": None, "mirai": 1.0}, "2 flows within 10 microseconds from "
         "2024-03-01 00:00:00 UTC, to 23/tcp (1) and 80/tcp (1), usually 10 microseconds apart; "
         "mark of Mirai on 100% of them"),
        ({"dst_port": [-1], "proto": [47], "dst": [-1], "gap_us": [0]},
         "1 flow from 2024-03-01 00:00:00 UTC, to gre, no port"),
        ({"dst_port": [5, 4, 3, 2, 1, 1], "proto": [6] * 6, "dst": [9] * 6, "gap_us": [0] * 6},
         "6 flows within 0 seconds from 2024-03-01 00:00:00 UTC, to 5 ports: 1/tcp (2), 2/tcp (1), "
         "3/tcp (1), …, 1 destination, usually 0 seconds apart"),
    ],
)  # fmt: skip
def test_a_sequence_in_words(more: dict[str, Any], said: str) -> None:
    (row,) = sequence_table([sequence(1, 2, **more)]).to_pylist()
    assert words.sequence(row) == said


# ---------------------------------------------------------------------------------------------
# Over the periods
# ---------------------------------------------------------------------------------------------


def followed(*rows: tuple[str, str, str, int]) -> pa.Table:
    """Rows of (period, campaign, event, sources); without sources, of a campaign that has no cluster."""
    at = START_US
    base = dict.fromkeys(CAMPAIGNS.names) | {"networks": 1, "flows": 1, "labelled": 0, "began": at, "size": 2}
    return pa.Table.from_pylist(
        [
            {
                **base, "period": period, "campaign": campaign, "event": event, "sources": sources,
                "sequences": 2 if sources else 0, "cluster": 0 if sources else None,
                "absent": int(not sources),
            }
            for period, campaign, event, sources in rows
        ],
        CAMPAIGNS,
    )  # fmt: skip


STORY = followed(
    ("1", "a-1", "born", 10),
    ("1", "b-2", "born", 4),
    ("2", "a-1", "continued", 25),
    ("2", "b-2", "gone", 0),
    ("3", "a-1", "continued", 20),
    ("3", "b-2", "continued", 4),
    ("3", "c-3", "split", 1),
)


def test_change_is_against_the_last_time() -> None:
    rows = history.with_change(STORY.take([6, 5, 4, 3, 2, 1, 0])).to_pylist()
    said = {(row["period"], row["campaign"]): words.change(row) for row in rows}
    assert said == {
        ("1", "a-1"): "new", ("1", "b-2"): "new", ("2", "a-1"): "grown × 2.5", ("2", "b-2"): "gone",
        ("3", "a-1"): "−20%", ("3", "b-2"): "back, as many", ("3", "c-3"): "split off",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "became", "said"),
    [
        (20, 30, "grown", "grown +50%"),
        (20, 29, "continued", "+45%"),
        (20, 10, "shrunk", "shrunk −50%"),
        (21, 11, "continued", "−48%"),
        (4, 13, "continued", "× 3.2"),  # fewer than ten more
        (12, 3, "continued", "−75%"),
        (4, 14, "grown", "grown × 3.5"),
        (100, 100, "continued", "as many"),
    ],
)
def test_grown_and_shrunk(before: int, now: int, became: str, said: str) -> None:
    story = followed(("1", "a-1", "born", before), ("2", "a-1", "continued", now))
    row = history.with_change(story).to_pylist()[1]
    assert (row["became"], words.change(row)) == (became, said)


def test_events_and_timeline() -> None:
    table = history.with_change(STORY)
    assert history.events(table)[1] == {
        "period": "2",
        "born": 0,
        "grown": 1,
        "continued": 0,
        "shrunk": 0,
        "split": 0,
        "merged": 0,
        "gone": 1,
    }
    lines = history.timeline(table, ["2", "3"], 2)
    assert [line.campaign for line in lines] == ["a-1", "b-2"]
    assert [[cell and cell["sources"] for cell in line.cells] for line in lines] == [[25, 20], [0, 4]]


def test_short_names_are_as_long_as_they_must_be() -> None:
    names = ("2024-03-aaaa1", "2024-03-aaaa2", "2024-04-bbbbbbbb")
    table = followed(*(("1", name, "born", 1) for name in names))
    assert list(history.short_names(table).values()) == ["2024-03-aaaa1", "2024-03-aaaa2", "2024-04-bbbbb"]
    assert history.short_names(table.slice(2))[names[2]] == "2024-04-bbbb"
    assert history.short_names(table.slice(0, 0)) == {}
