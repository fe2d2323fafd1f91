"""Contraction on sums against contraction on an explicit graph."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from cc_oracles import greedy, pair_weights, points_around_centres, value
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.clustering import canonical, objective, solve
from rayscan.clustering.contraction import contract, weight_matrix
from rayscan.clustering.greedy import greedy_contraction
from rayscan.clustering.objective import cluster_sums


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.floats(-0.3, 0.9))
def test_greedy_order_is_that_of_the_explicit_graph(seed: int, n: int, threshold: float) -> None:
    x = points_around_centres(n, seed)
    expected = canonical(greedy(pair_weights(x, threshold)))
    assert np.array_equal(solve(x, threshold, greedy=True), expected)
    dense = contract(weight_matrix(x, np.ones(n), threshold), np.ones(n), greedy=True)
    assert np.array_equal(canonical(dense), expected)


def test_greedy_on_super_nodes_continues_where_points_stopped() -> None:
    """Contracting the nodes of a higher threshold is the explicit contraction of their summed weights."""
    x = points_around_centres(60, 3)
    nodes = canonical(greedy_contraction(x, np.ones(60), 0.8))
    k = nodes.max() + 1
    sums, sizes = cluster_sums(x, nodes, k)
    w = pair_weights(x, 0.4)
    joint = np.array([[w[np.ix_(nodes == a, nodes == b)].sum() for b in range(k)] for a in range(k)])
    np.fill_diagonal(joint, 0)
    assert np.array_equal(canonical(greedy_contraction(sums, sizes, 0.4)), canonical(greedy(joint)))


def test_greedy_survives_compaction_and_tiles() -> None:
    """More rows than a tile, and joins that halve the table several times."""
    x = points_around_centres(1500, 5, k=40, d=24)
    tall = greedy_contraction(x, np.ones(1500), 0.4)
    dense = contract(weight_matrix(x, np.ones(1500), 0.4), np.ones(1500), greedy=True)
    assert objective(x, tall, 0.4) == pytest.approx(objective(x, dense, 0.4), rel=1e-9)
    assert all(tall[i] <= i and tall[tall[i]] == tall[i] for i in range(1500))


@pytest.mark.parametrize("by_weight", [True, False])
def test_contraction_stops_when_no_pair_is_positive(by_weight: bool) -> None:
    x = points_around_centres(200, 7)
    labels = canonical(contract(weight_matrix(x, np.ones(200), 0.35), np.ones(200), greedy=by_weight))
    sums, sizes = cluster_sums(x, labels, labels.max() + 1)
    joint = sums @ sums.T - 0.35 * np.outer(sizes, sizes)
    np.fill_diagonal(joint, -1)
    assert joint.max() <= 1e-3
    assert objective(x, labels, 0.35) == pytest.approx(value(pair_weights(x, 0.35), labels), abs=1e-6)


def test_four_points_where_the_order_decides() -> None:
    """Angles 0, 40, 75 and 110 degrees: the closest, 40 and 75 or 75 and 110, join first."""
    angle = np.radians([0, 40, 75, 110])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    # w(40,75) = w(75,110) = .319, w(0,40) = .266, w(40,110) = -.158, w(0,75) = -.241, w(0,110) = -.842
    assert solve(x, 0.5, greedy=True).tolist() == [0, 1, 1, 1]
    assert solve(x, 0.5).tolist() == [0, 0, 1, 1]


def test_greedy_takes_little_memory_where_all_rows_are_equal() -> None:
    """All pairs then lie inside the margin of float32; as float64 rows they would take 2 GB."""
    x = np.repeat(points_around_centres(2, 3, k=2, d=128), 1000, axis=0)
    tracemalloc.start()
    try:
        labels = solve(x, 0.9, greedy=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert labels.tolist() == [0] * 1000 + [1] * 1000
    assert peak < 500e6
