"""The solver against all partitions, an upper bound, the published methods, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
from cc_oracles import (
    greedy,
    kernighan_lin,
    optimum,
    pair_weights,
    points_around_centres,
    upper_bound,
    value,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.clustering import canonical, objective, solve, sweep
from rayscan.clustering.multilevel import solve_nodes
from rayscan.clustering.objective import cluster_sums
from rayscan.clustering.partition import Partition
from rayscan.clustering.splitting import refine, tighter_parts
from rayscan.errors import DataError


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(-0.5, 0.9))
def test_optimal_on_up_to_eight_points(seed: int, n: int, threshold: float) -> None:
    x = points_around_centres(n, seed, k=3, d=4)
    w = pair_weights(x, threshold)
    best, found = optimum(w), objective(x, solve(x, threshold), threshold)
    assert found <= best + 1e-5
    assert found >= 0.97 * best - 1e-5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9))
def test_optimal_where_clusters_lie_apart(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    planted = rng.integers(3, size=n)
    x = np.eye(3)[planted] + 0.2 * rng.uniform(-1, 1, (n, 3))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    labels = solve(x, 0.7)
    assert np.array_equal(labels, canonical(planted))
    assert objective(x, labels, 0.7) == pytest.approx(optimum(pair_weights(x, 0.7)), abs=1e-5)


def test_nearly_always_optimal_on_nine_points() -> None:
    missed = 0
    for seed in range(6):
        x = points_around_centres(9, seed, k=3, d=5)
        missed += objective(x, solve(x, 0.2), 0.2) < optimum(pair_weights(x, 0.2)) - 1e-5
    assert missed <= 1


@pytest.mark.parametrize(("n", "threshold"), [(20, 0.2), (30, 0.4), (40, 0.3)])
def test_close_to_the_triangle_bound(n: int, threshold: float) -> None:
    x = points_around_centres(n, n)
    bound, found = upper_bound(pair_weights(x, threshold)), objective(x, solve(x, threshold), threshold)
    assert found <= bound + 1e-4
    assert found >= 0.99 * bound  # the bound is loose: fractional optima exist


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("seed", [1, 2])
def test_at_least_contraction_and_kernighan_lin(seed: int, threshold: float) -> None:
    x = points_around_centres(40, seed, k=9, d=8)
    w = pair_weights(x, threshold)
    contracted = greedy(w)
    found = objective(x, solve(x, threshold), threshold)
    assert found >= value(w, contracted) - 1e-6
    assert found >= 0.999 * value(w, kernighan_lin(w, contracted))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 120), st.floats(-0.1, 0.9))
def test_permuting_rows_permutes_labels(seed: int, n: int, threshold: float) -> None:
    x = points_around_centres(n, seed)
    x = np.concatenate([x, x[: n // 3]])  # equal rows too
    order = np.random.default_rng(seed).permutation(len(x))
    assert np.array_equal(solve(x[order], threshold), canonical(solve(x, threshold)[order]))


def test_permuting_rows_permutes_labels_of_many_blocks() -> None:
    x = points_around_centres(4000, 3, k=60, d=24)
    order = np.random.default_rng(0).permutation(4000)
    assert np.array_equal(solve(x[order], 0.4), canonical(solve(x, 0.4)[order]))


def test_rotation_keeps_the_objective() -> None:
    x = points_around_centres(600, 5, k=20)
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))
    turned = (x @ q).astype(np.float32)
    a, b = objective(x, solve(x, 0.4), 0.4), objective(turned, solve(turned, 0.4), 0.4)
    assert b == pytest.approx(a, rel=2e-3)


def test_seed_decides() -> None:
    x = points_around_centres(2500, 8, k=50, d=12)
    labels = [solve(x, 0.4, seed=seed) for seed in (3, 3, 4, 5)]
    assert np.array_equal(labels[0], labels[1])
    assert not all(np.array_equal(labels[0], other) for other in labels[2:])


def test_arguments_that_would_be_ignored_are_refused() -> None:
    x = points_around_centres(20, 1)
    with pytest.raises(DataError, match="leave out init, or greedy"):
        solve(x, 0.4, greedy=True, init=np.zeros(20, int))
    with pytest.raises(DataError, match="cannot be normalised"):
        solve(x, 0.4, sizes=np.ones(20), normalise=True)


def test_equal_rows_stay_together() -> None:
    x = np.tile(points_around_centres(120, 2), (5, 1))
    labels = solve(x, 0.9).reshape(5, 120)
    assert (labels == labels[0]).all()
    assert solve(np.tile(x[:1], (300, 1)), 0.5).max() == 0


@pytest.mark.parametrize(
    ("threshold", "clusters"),
    [(-1.5, 1), (-1.0, 1), (1.01, 50), (5.0, 50)],
    ids=["below", "-1", "1", "above"],
)
def test_thresholds_that_leave_no_choice(threshold: float, clusters: int) -> None:
    x = points_around_centres(50, 0)
    assert solve(x, threshold).max() + 1 == clusters


def test_opposite_and_orthogonal_vectors() -> None:
    assert solve(np.array([[1, 0], [-1, 0]], np.float32), 0.0).tolist() == [0, 1]
    assert solve(np.eye(30, dtype=np.float32), 0.1).tolist() == list(range(30))
    assert solve(np.eye(30, dtype=np.float32), -0.1).tolist() == [0] * 30


def test_empty_single_and_bad_input() -> None:
    assert solve(np.empty((0, 4), np.float32), 0.4).tolist() == []
    assert solve(np.array([[0, 1]]), 0.4).tolist() == [0]
    with pytest.raises(DataError, match="row 1 is not finite"):
        solve([[1, 0], [np.nan, 0]], 0.4)
    with pytest.raises(DataError, match="row 0 has length 5"):
        solve([[3, 4], [1, 0]], 0.4)
    assert solve([[3, 4], [6, 8]], 0.4, normalise=True).tolist() == [0, 0]
    with pytest.raises(DataError, match="threshold"):
        solve([[1, 0]], float("nan"))
    with pytest.raises(DataError, match="init"):
        solve([[1, 0]], 0.4, init=[0, 1])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.8))
def test_never_ends_below_where_it_starts(seed: int, threshold: float) -> None:
    x = points_around_centres(90, seed)
    start = np.random.default_rng(seed).integers(7, size=90)
    labels = solve(x, threshold, init=start)
    assert objective(x, labels, threshold) >= objective(x, start, threshold) - 1e-6


def test_super_nodes_are_kept_whole_and_joined_like_points() -> None:
    x = points_around_centres(400, 4, k=10)
    nodes = solve(x, 0.8)
    sums, sizes = cluster_sums(x, nodes, nodes.max() + 1)
    labels = solve(sums, 0.3, sizes=sizes)
    assert labels.shape == sizes.shape
    assert objective(x, labels[nodes], 0.3) >= 0.97 * objective(x, solve(x, 0.3), 0.3)
    again = solve(sums, 0.3, sizes=sizes, init=labels)
    assert objective(sums, again, 0.3, sizes) >= objective(sums, labels, 0.3, sizes) - 1e-6
    with pytest.raises(DataError, match=r"row \d+ is longer than a sum"):
        solve(sums, 0.3, sizes=np.ones(len(sums)))


def test_many_blocks_reach_what_one_dense_problem_reaches() -> None:
    x = points_around_centres(2000, 9, k=40, d=20)
    one, nodes = np.ones(2000), np.arange(2000)
    dense = objective(x, solve_nodes(x, one, 0.4).labels, 0.4)
    blocks = objective(x, solve_nodes(np.concatenate([x, x[:100]]), np.ones(2100), 0.4).labels[nodes], 0.4)
    assert blocks >= 0.98 * dense


def test_refinement_splits_what_single_moves_cannot() -> None:
    """Two groups thrown together: every point gains by staying, the cluster gains by falling apart."""
    rng = np.random.default_rng(0)
    a, b = np.eye(8)[0], np.array([0.25, np.sqrt(1 - 0.0625), 0, 0, 0, 0, 0, 0])
    x = np.concatenate([c + 0.02 * rng.standard_normal((60, 8)) for c in (a, b)])
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    together = np.zeros(120, np.int64)
    parts = tighter_parts(x, np.ones(120), together, 0.45)
    assert len(np.unique(parts)) == 2
    partition = Partition.of(x, np.ones(120), together, 0.3)
    gained = refine(partition)
    assert gained == pytest.approx(objective(x, partition.labels, 0.3) - objective(x, together, 0.3))
    assert canonical(partition.labels).tolist() == [0] * 60 + [1] * 60


def test_sweep_keeps_up_with_single_solves() -> None:
    x = points_around_centres(1200, 6, k=30, d=16)
    thresholds = [0.1, 0.2, 0.4, 0.6, 1.5]
    for threshold, labels in zip(thresholds, sweep(x, thresholds), strict=True):
        alone = objective(x, solve(x, threshold), threshold)
        assert objective(x, labels, threshold) >= 0.99 * alone - 1e-6
        assert np.array_equal(labels, canonical(labels))
