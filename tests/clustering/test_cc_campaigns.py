"""Campaigns: events by hand, the assignment against a dense one, names independent of order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import rayscan.clustering.campaigns as of_campaigns
from rayscan.clustering.campaigns import CANDIDATES, Campaigns, Ended, follow
from rayscan.errors import DataError

E = np.eye(6)


def campaigns(*clusters: tuple[str, np.ndarray, int]) -> Campaigns:
    """Campaigns whose members all point in one direction."""
    names, directions, sizes = zip(*clusters, strict=True)
    return Campaigns(list(names), np.stack(directions) * np.array(sizes)[:, None], np.array(sizes, float))


def test_the_first_period_bears_all() -> None:
    step = follow(Campaigns.none(), "2024-01", [17, 3], [4 * E[0], 2 * E[1]], [4, 2], 0.5)
    assert step.names == ["2024-01-11", "2024-01-3"]
    assert step.events == ["born", "born"]
    assert step.ended == []


def test_every_event_once() -> None:
    near = np.array([0.8, 0.6, 0, 0, 0, 0])
    before = campaigns(
        ("stays", E[2], 5), ("big", E[0], 20), ("small", near, 3), ("halves", E[3], 10), ("lost", E[4], 4)
    )
    sums = [6 * E[2], 22 * E[0], 7 * E[3], 5 * E[3], 4 * E[5]]
    step = follow(before, "2024-02", [1, 2, 3, 4, 5], sums, [6, 22, 7, 5, 4], 0.5)
    assert step.names == ["stays", "big", "halves", "2024-02-4", "2024-02-5"]
    assert step.events == ["continued", "continued", "continued", "split", "born"]
    assert step.parents == [None, None, None, "halves", None]
    assert step.ended == [Ended("lost", "gone", None), Ended("small", "merged", "big")]


def test_assignment_looks_at_the_total() -> None:
    """Cluster 0 fits `a` best, but `b` has nothing else: together they gain more the other way round."""
    unit = np.array([0.8, 0.6, 0, 0, 0, 0])
    before = campaigns(("a", unit, 10), ("b", E[0], 10))
    step = follow(before, "p", [1, 2], [10 * E[0] * 0.99, 10 * E[1]], [10, 10], 0.5)
    assert step.names == ["b", "a"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.8))
def test_equals_a_dense_assignment(seed: int, k: int, m: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    old, new = rng.standard_normal((k, 6)), rng.standard_normal((m, 6))
    old, new = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (old, new))
    a, b = rng.integers(1, 9, k).astype(float), rng.integers(1, 9, m).astype(float)
    before = Campaigns([f"c{i}" for i in range(k)], old * a[:, None], a)
    step = follow(before, "p", np.arange(m), new * b[:, None], b, threshold)
    weight = np.maximum((old * a[:, None]) @ (new * b[:, None]).T - threshold * np.outer(a, b), 0)
    best = weight[linear_sum_assignment(-weight)].sum()
    carried = [(int(name[1:]), j) for j, name in enumerate(step.names) if step.events[j] == "continued"]
    assert sum(weight[i, j] for i, j in carried) == pytest.approx(best, abs=1e-9)
    assert all(weight[i, j] > 0 for i, j in carried)
    order, shuffle = rng.permutation(k), rng.permutation(m)
    again = follow(
        Campaigns([before.names[i] for i in order], before.sums[order], a[order]),
        "p",
        np.arange(m)[shuffle],
        (new * b[:, None])[shuffle],
        b[shuffle],
        threshold,
    )
    assert [again.names[i] for i in np.argsort(shuffle)] == step.names
    assert again.ended == step.ended


def test_candidates_are_the_best_of_each_row_and_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows have no positive weight, some fewer than are kept, some more."""
    monkeypatch.setattr(of_campaigns, "_CELLS", 100)
    rng = np.random.default_rng(3)
    old, new = rng.standard_normal((60, 4)), rng.standard_normal((45, 4))
    old[30:] *= 0.5
    m, n = np.ones(60), np.ones(45)
    weight = old @ new.T - 1.5
    positive = np.count_nonzero(weight > 0, axis=1)
    assert positive.min() == 0 and (positive > CANDIDATES).any() and (positive == 3).any()
    rows = {(i, int(j)) for i, row in enumerate(weight) for j in np.argsort(-row)[:CANDIDATES]}
    columns = {(int(i), j) for j, column in enumerate(weight.T) for i in np.argsort(-column)[:CANDIDATES]}
    a, c, gained = of_campaigns._edges(old, m, new, n, 1.5)
    found = set(zip(a.tolist(), c.tolist(), strict=True))
    assert found == {(i, j) for i, j in rows | columns if weight[i, j] > 0}
    assert len(found) < np.count_nonzero(weight > 0)
    assert np.allclose(gained, weight[a, c])


def test_bad_input() -> None:
    with pytest.raises(DataError, match="distinct"):
        follow(Campaigns.none(), "p", [1, 1], [E[0], E[1]], [1, 1], 0.5)
    with pytest.raises(DataError, match="among its own predecessors"):
        follow(campaigns(("p-1", E[0], 1), ("p-2", E[1], 1)), "p", [1, 3], [E[2], E[3]], [1, 1], 0.5)
    step = follow(campaigns(("a", E[0], 2)), "p", [], np.empty((0, 6)), [], 0.5)
    assert step.ended == [Ended("a", "gone", None)]
