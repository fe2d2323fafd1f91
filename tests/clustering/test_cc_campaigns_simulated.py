"""Campaigns of a simulated telescope that start, end, pause, drift, split and merge, month after month.

The vectors are port counts of sources, so that who is like whom can be read off the ports below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from rayscan.clustering import Campaigns, follow, solve
from rayscan.clustering.campaigns import Step
from rayscan.clustering.objective import cluster_sums
from rayscan.simulate import Campaign, simulate

THRESHOLD = 0.4
FEBRUARY, MARCH = 31 / 91, 60 / 91  # when they begin, as shares of the three months
TWO = (7001, 7002), (7003, 7004)
FOUR = (*TWO[0], *TWO[1])
HALVES = (*TWO[0], 7101, 7102), (*TWO[1], 7103, 7104)  # half like FOUR, nothing like each other


def scan(
    name: str, ports: tuple[int, ...], later: tuple[int, ...] = (), sources: int = 8,
    begin: float = 0.0, end: float = 1.0,
) -> Campaign:  # fmt: skip
    """A scan whose ports are others from February on."""
    return Campaign(
        name, "zmap", ports, sources, 600 * sources, later_ports=later, change=FEBRUARY if later else 1.0,
        begin=begin, end=end, spread=2.0,
    )  # fmt: skip


def plus(ports: tuple[int, ...], by: int) -> tuple[int, ...]:
    return tuple(port + by for port in ports)


CAMPAIGNS = (
    scan("stays", (23, 2323)),
    scan("starts", (445, 139), begin=FEBRUARY),
    scan("ends", (3389, 3390), end=MARCH),
    scan("pauses", (5900, 5901), end=FEBRUARY),
    scan("pauses, back", (5900, 5901), begin=MARCH),
    scan("drifts", (80, 81, 82, 8080), (80, 81, 82, 8888)),
    scan("splits, more", FOUR, HALVES[0], sources=12),
    scan("splits, less", FOUR, HALVES[1]),
    scan("merges, more", plus(HALVES[0], 1000), plus(FOUR, 1000), sources=12),
    scan("merges, less", plus(HALVES[1], 1000), plus(FOUR, 1000)),
)


@dataclass(frozen=True)
class Month:
    """Sources (N,), their vectors (N, d), and the simulated campaign of each."""

    name: str
    src: np.ndarray
    vectors: np.ndarray
    truth: list[str]


@pytest.fixture(scope="module")
def months() -> list[Month]:
    telescope = simulate(CAMPAIGNS, seed=1)
    truth = dict(zip(*(telescope.truth[name].to_pylist() for name in ("src", "campaign")), strict=True))
    ports = sorted({port for c in CAMPAIGNS for port in (*c.ports, *c.later_ports)})
    found = []
    for name, flows in zip(telescope.months, telescope.flows(), strict=True):
        src, row = np.unique(flows["src_ip"].to_numpy().astype(np.int64), return_inverse=True)
        counts = np.zeros((len(src), len(ports)))
        np.add.at(counts, (row, np.searchsorted(ports, flows["dst_port"].to_numpy())), 1)
        vectors = (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)
        found.append(Month(name, src, vectors, [truth[source] for source in src.tolist()]))
    return found


def shuffled(month: Month, seed: int) -> Month:
    order = np.random.default_rng(seed).permutation(len(month.src))
    return Month(month.name, month.src[order], month.vectors[order], [month.truth[i] for i in order])


@dataclass(frozen=True)
class Followed:
    """A period's step, by simulated campaign, and the campaigns that the next period may carry on."""

    step: Step
    names: dict[str, str]
    events: dict[str, str]
    parents: dict[str, str | None]
    after: Campaigns


def follow_month(before: Campaigns, month: Month) -> Followed:
    labels = solve(month.vectors, THRESHOLD)
    k = int(labels.max()) + 1
    keys = [int(month.src[labels == c].min()) for c in range(k)]
    sums, sizes = cluster_sums(month.vectors, labels, k)
    step = follow(before, month.name, keys, sums, sizes, THRESHOLD)
    cluster = dict(zip(month.truth, labels.tolist(), strict=True))
    assert all(cluster[true] == c for true, c in zip(month.truth, labels.tolist(), strict=True))
    gone = [before.names.index(ended.name) for ended in step.ended if ended.event == "gone"]
    after = Campaigns(
        [*step.names, *(before.names[i] for i in gone)],
        np.concatenate([sums, before.sums[gone].reshape(len(gone), -1)]) if gone else sums,
        np.concatenate([sizes, before.sizes[gone]]),
    )
    return Followed(
        step,
        {true: step.names[c] for true, c in cluster.items()},
        {true: step.events[c] for true, c in cluster.items()},
        {true: step.parents[c] for true, c in cluster.items()},
        after,
    )


def follow_all(months: list[Month]) -> list[Followed]:
    found: list[Followed] = []
    for month in months:
        found.append(follow_month(found[-1].after if found else Campaigns.none(), month))
    return found


def test_what_happens_to_each(months: list[Month]) -> None:
    january, february, march = follow_all(months)
    assert set(january.events.values()) == {"born"}
    for same in ("stays", "drifts"):
        assert february.events[same] == march.events[same] == "continued"
        assert january.names[same] == february.names[same] == march.names[same]
    assert "starts" not in january.names
    assert (february.events["starts"], march.events["starts"]) == ("born", "continued")
    assert february.names["starts"] == march.names["starts"]
    assert february.names["ends"] == january.names["ends"]
    assert (january.names["ends"], "gone") in {(e.name, e.event) for e in march.step.ended}
    assert (january.names["pauses"], "gone") in {(e.name, e.event) for e in february.step.ended}
    assert march.names["pauses, back"] == january.names["pauses"]


def test_splits_and_merges(months: list[Month]) -> None:
    january, february, march = follow_all(months)
    whole = january.names["splits, more"]
    assert january.names["splits, less"] == whole
    assert february.names["splits, more"] == whole
    assert (february.events["splits, less"], february.parents["splits, less"]) == ("split", whole)
    assert february.names["splits, less"] not in january.names.values()
    assert march.events["splits, less"] == march.events["splits, more"] == "continued"
    assert march.names["splits, less"] == february.names["splits, less"]

    large, small = january.names["merges, more"], january.names["merges, less"]
    assert large != small
    assert february.names["merges, more"] == february.names["merges, less"] == large
    assert (small, "merged", large) in {(e.name, e.event, e.into) for e in february.step.ended}
    assert small not in march.after.names


@pytest.mark.parametrize("seed", [1, 2])
def test_names_do_not_depend_on_the_order_of_rows(months: list[Month], seed: int) -> None:
    expected = follow_all(months)
    found = follow_all([shuffled(month, seed) for month in months])
    for one, other in zip(found, expected, strict=True):
        assert (one.names, one.events, one.parents) == (other.names, other.events, other.parents)
        assert one.step.ended == other.step.ended


def test_a_period_processed_again_keeps_its_names(months: list[Month]) -> None:
    """From the campaigns before it, and with a late sequence: only what the late one joins may change."""
    january, february, _ = follow_all(months)
    again = follow_month(january.after, shuffled(months[1], 3))
    assert again.names == february.names
    late = months[1]
    nearest = late.truth.index("stays")
    grown = Month(
        late.name,
        np.append(late.src, 1),  # smaller than every other: a new cluster would be named after it
        np.concatenate([late.vectors, late.vectors[[nearest]]]),
        [*late.truth, "stays"],
    )
    assert follow_month(january.after, grown).names == february.names
