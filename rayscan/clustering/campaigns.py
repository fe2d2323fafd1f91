"""Campaigns: clusters of successive periods that carry on one another.

A campaign is represented by the feature sum and size of the cluster it last was. Its weight to a cluster of a
new period is their joint weight ⟨F_A, F_C⟩ − θ n_A n_C, the very quantity that decides whether two clusters
of one period belong together. Only positive weights count. Where several compete, the one-to-one assignment
of largest total weight says which cluster carries the campaign on:

    continued   a cluster that an earlier campaign is assigned to
    split       a cluster whose best campaign is carried on by another cluster; a new campaign with a parent
    born        a cluster without positive weight to any campaign
    merged      a campaign whose best cluster carries on another campaign
    gone        a campaign without positive weight to any cluster

A campaign is named after the period and the earliest sequence of the cluster it began as. Names therefore
depend neither on the order of rows or clusters nor on what is processed when: processing a period again
from the same predecessors gives the same names, and a period that has gone on keeps them for as long as the
earliest sequences of its clusters stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from rayscan.clustering.objective import F64, I64, check_sums, check_threshold
from rayscan.clustering.products import one_thread
from rayscan.errors import DataError

Event = Literal["born", "continued", "split", "merged", "gone"]

_CELLS = 1 << 21  # weights that are formed at a time: 35 MB with what chooses among them

CANDIDATES = 8
"""Counterparts that a campaign or cluster can be assigned to: those of largest positive weight."""


@dataclass(frozen=True)
class Campaigns:
    """Campaigns by name, with feature sums float64 (K, d) and sizes float64 (K,) of their last clusters."""

    names: Sequence[str]
    sums: F64
    sizes: F64

    @classmethod
    def none(cls) -> Campaigns:
        """No campaigns: what the first period follows."""
        return cls([], np.empty((0, 0)), np.empty(0))


@dataclass(frozen=True)
class Ended:
    """A campaign that no cluster of the new period carries on, and the one it went into if it merged."""

    name: str
    event: Event
    into: str | None


@dataclass(frozen=True)
class Step:
    """The campaign of each cluster of a period, what happened to it, its parent if split; and what ended."""

    names: list[str]
    events: list[Event]
    parents: list[str | None]
    ended: list[Ended]


@one_thread
def follow(
    before: Campaigns,
    period: str,
    keys: ArrayLike,
    sums: ArrayLike,
    sizes: ArrayLike,
    threshold: float,
) -> Step:
    """Campaigns of the clusters of a new period.

    `keys` int64 (K,), distinct: the id of each cluster's earliest sequence; `sums` (K, d) and `sizes` (K,).
    `before` are the campaigns to carry on, in any order; leave out those that are gone for too long.
    """
    new, counts = check_sums(sums, sizes)
    old, old_counts = check_sums(before.sums, before.sizes)
    key = np.asarray(keys, np.int64)
    if key.shape != counts.shape or len(np.unique(key)) != len(key):
        raise DataError("keys must be distinct, one for each cluster: the id of one of its sequences")
    if len(set(before.names)) != len(old):
        raise DataError("names of campaigns must be distinct, one for each sum")
    rows, columns = np.argsort(np.array(before.names, dtype=str), kind="stable"), np.argsort(key)
    a, c, weight = _edges(
        old[rows], old_counts[rows], new[columns], counts[columns], check_threshold(threshold)
    )
    carried = _assign(a, c, weight, len(rows), len(columns))
    a, c = rows[a], columns[c]
    return _describe(before.names, period, key, _in_given_order(carried, rows, columns), (a, c, weight))


def _in_given_order(carried: I64, rows: I64, columns: I64) -> dict[int, int]:
    """Campaign -> cluster that carries it on, in the order of the arguments of `follow`."""
    return {int(rows[i]): int(columns[j]) for i, j in enumerate(carried) if j >= 0}


def _edges(old: F64, m: F64, new: F64, n: F64, threshold: float) -> tuple[I64, I64, F64]:
    """Positive joint weights of campaigns and clusters: the CANDIDATES best of each row and column."""
    if not len(old) or not len(new):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    found = [_strongest(old, m, new, n, threshold), _strongest(new, n, old, m, threshold)[::-1]]
    pairs = np.unique(np.concatenate([np.stack(pair, axis=1) for pair in found]), axis=0)
    a, c = pairs[:, 0], pairs[:, 1]
    weight = np.einsum("ij,ij->i", old[a], new[c]) - threshold * m[a] * n[c]
    keep = weight > 0
    return a[keep], c[keep], weight[keep]


def _strongest(left: F64, m: F64, right: F64, n: F64, threshold: float) -> tuple[I64, I64]:
    """Pairs (left, right) of the CANDIDATES largest positive weights of each left one.

    Few weights are positive, and to choose among all takes longer than to form them: only where a row has
    more than it needs, its best are chosen.
    """
    pairs = []
    step = max(1, _CELLS // len(right))
    for start in range(0, len(left), step):
        part = slice(start, start + step)
        losses = left[part] @ right.T
        np.subtract(threshold * m[part, None] * n, losses, out=losses)
        gains = losses < 0
        many = np.flatnonzero(np.count_nonzero(gains, axis=1) > CANDIDATES)
        if len(many):
            best = np.argpartition(losses[many], CANDIDATES - 1, axis=1)[:, :CANDIDATES]
            gains[many] = False
            gains[many[:, None], best] = True
        row, column = np.nonzero(gains)
        pairs.append((start + row, column))
    return np.concatenate([row for row, _ in pairs]), np.concatenate([column for _, column in pairs])


def _assign(a: I64, c: I64, weight: F64, n_old: int, n_new: int) -> I64:
    """Cluster of each campaign, or -1, in the one-to-one assignment of largest total weight.

    Each campaign may also take a column of its own that gains nothing, so that a full matching exists.
    """
    if not len(a):
        return np.full(n_old, -1)
    top = 2 * weight.max()  # costs must be positive: an entry of 0 would count as missing
    cost = np.concatenate([top - weight, np.full(n_old, top)])
    rows = np.concatenate([a, np.arange(n_old)])
    columns = np.concatenate([c, n_new + np.arange(n_old)])
    graph = csr_array((cost, (rows, columns)), shape=(n_old, n_new + n_old))
    _, taken = min_weight_full_bipartite_matching(graph)
    return np.where(taken < n_new, taken, -1)


def _describe(
    names: Sequence[str], period: str, key: I64, carried: dict[int, int], edges: tuple[I64, I64, F64]
) -> Step:
    a, c, weight = edges
    best_campaign = _best(c, a, weight)
    best_cluster = _best(a, c, weight)
    carrier = {j: i for i, j in carried.items()}
    ids, events, parents = [], list[Event](), list[str | None]()
    for j in range(len(key)):
        parent = None if j in carrier or j not in best_campaign else names[best_campaign[j]]
        ids.append(names[carrier[j]] if j in carrier else f"{period}-{int(key[j]) & (2**64 - 1):x}")
        events.append("continued" if j in carrier else "born" if parent is None else "split")
        parents.append(parent)
    if not set(names).isdisjoint(
        name for name, event in zip(ids, events, strict=True) if event != "continued"
    ):
        raise DataError(f"a campaign that began in {period} is among its own predecessors: leave it out")
    ended = [
        Ended(names[i], "merged", ids[best_cluster[i]])
        if i in best_cluster
        else Ended(names[i], "gone", None)
        for i in sorted(range(len(names)), key=lambda i: names[i])
        if i not in carried
    ]
    return Step(ids, events, parents, ended)


def _best(of: I64, among: I64, weight: F64) -> dict[int, int]:
    """For each value of `of` the value of `among` at its largest weight."""
    order = np.argsort(weight, kind="stable")
    return dict(zip(of[order].tolist(), among[order].tolist(), strict=True))
