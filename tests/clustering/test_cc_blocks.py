"""Blocks: the result depends on blocks, threshold and seed, and on nothing else; quality and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from cc_oracles import pair_weights, points_around_centres
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.clustering import canonical, objective, serial_map, solve, solve_block, solve_blocked, weights
from rayscan.clustering.blocks import Solution
from rayscan.clustering.moves import Clusters
from rayscan.clustering.multilevel import merge
from rayscan.clustering.objective import cluster_sums
from rayscan.errors import DataError


def blocked(x: np.ndarray, cuts: Sequence[int], threshold: float, **options: Any) -> Solution:
    parts = np.split(x, cuts)
    return solve_blocked(lambda i: parts[i], len(parts), threshold, **options)


def last_first(task: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterable[Any]:
    """Tasks that end in reverse order."""
    return reversed([task(item, shared) for item in reversed(items)])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.floats(0, 0.8), st.data())
def test_any_blocks_give_a_sound_solution(seed: int, n: int, threshold: float, data: st.DataObject) -> None:
    x = points_around_centres(n, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))  # empty blocks too
    solution = blocked(x, cuts, threshold)
    labels = np.concatenate(solution.labels)
    assert np.array_equal(labels, canonical(labels))
    sums, sizes = cluster_sums(x, labels, len(solution.clusters))
    assert solution.clusters.sums == pytest.approx(sums, abs=1e-6)
    assert np.array_equal(solution.clusters.sizes, sizes)
    parts = np.split(x, cuts)
    apart = sum(objective(part, solve_block(part, threshold)[0], threshold) for part in parts)
    assert objective(x, labels, threshold) >= apart - 1e-6  # joining blocks never costs


def test_the_order_in_which_tasks_end_changes_nothing() -> None:
    x = points_around_centres(3000, 1, k=50, d=16)
    a = blocked(x, [700, 1500, 2200], 0.4)
    b = blocked(x, [700, 1500, 2200], 0.4, map=last_first)
    assert all(np.array_equal(p, q) for p, q in zip(a.labels, b.labels, strict=True))
    assert np.array_equal(a.clusters.sums, b.clusters.sums)


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6])
def test_blocking_costs_next_to_nothing(threshold: float) -> None:
    x = points_around_centres(3000, 2, k=50, d=16)
    alone = objective(x, solve(x, threshold), threshold)
    for size in (300, 1000):
        solution = blocked(x, range(size, 3000, size), threshold)
        assert objective(x, np.concatenate(solution.labels), threshold) >= 0.99 * alone


@pytest.mark.parametrize("heavy", [20, 4096])
def test_no_round_lowers_the_objective(heavy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayscan.clustering.blocks.HEAVY_CLUSTERS", heavy)
    x = points_around_centres(2000, 3, k=40, d=12)
    values = []

    def watching(task: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterable[Any]:
        if shared is not None:  # a round: each item has the labels of its block
            values.append(objective(x, np.concatenate([labels for _, labels, _ in items]), 0.45))
        return serial_map(task, items, shared)

    solution = blocked(x, range(250, 2000, 250), 0.45, least_gain=0, map=watching)
    values.append(objective(x, np.concatenate(solution.labels), 0.45))
    assert len(values) == solution.rounds + 1 > 5
    assert values[-1] > values[0]
    assert all(after >= before - 1e-6 for before, after in pairwise(values))
    assert blocked(x, range(250, 2000, 250), 0.45, max_rounds=0).rounds == 0


def test_every_row_has_a_next_best_cluster_though_all_are_equally_heavy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rayscan.clustering.blocks.HEAVY_CLUSTERS", 10)
    x = np.eye(30, dtype=np.float32)
    _, best = weights(x, np.arange(30), Clusters.of(x, np.arange(30), np.ones(30)), 0.4)
    assert best == pytest.approx(np.full(30, -0.4))


def test_few_mover_bytes_delay_moves_and_end_as_well() -> None:
    x = points_around_centres(900, 4, k=20, d=12)
    free = blocked(x, [300, 600], 0.4, max_rounds=60, least_gain=0)
    tight = blocked(x, [300, 600], 0.4, max_rounds=60, least_gain=0, mover_bytes=3 * 4 * 12 * 5)
    a, b = (objective(x, np.concatenate(s.labels), 0.4) for s in (free, tight))
    assert b >= 0.99 * a
    assert tight.rounds > free.rounds
    assert tight.left == 0


@pytest.mark.parametrize("heavy", [5, 4096])
def test_nothing_left_means_that_no_row_gains_by_moving(heavy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first rounds saw five clusters only."""
    monkeypatch.setattr("rayscan.clustering.blocks.HEAVY_CLUSTERS", heavy)
    x = points_around_centres(800, 5, k=20, d=12)
    solution = blocked(x, [200, 400, 600], 0.4, max_rounds=60, least_gain=0)
    assert solution.left == 0
    parts = np.split(x, [200, 400, 600])
    for part, labels in zip(parts, solution.labels, strict=True):
        own, best = weights(part, labels, solution.clusters, 0.4)
        assert (np.maximum(np.nan_to_num(best, nan=0.0), 0) - own).max() < 1e-3


def test_rounds_end_with_one_that_gained_little() -> None:
    x = points_around_centres(2000, 3, k=40, d=12)
    cuts = range(250, 2000, 250)
    whole, short = (blocked(x, cuts, 0.45, max_rounds=60, least_gain=least) for least in (0, 1e-3))
    assert short.rounds < whole.rounds
    assert 0 < short.left <= 1e-3
    a, b = (objective(x, np.concatenate(s.labels), 0.45) for s in (whole, short))
    assert b >= 0.99 * a
    assert np.isnan(blocked(x, cuts, 0.45, max_rounds=0).left)


def test_weights_are_sums_over_pairs() -> None:
    x = points_around_centres(90, 6)
    labels = canonical(np.random.default_rng(0).integers(7, size=90))
    clusters = Clusters.of(x, labels, np.ones(90))
    own, best = weights(x, labels, clusters, 0.3)
    w = pair_weights(x, 0.3)
    table = np.stack([w[:, labels == c].sum(axis=1) for c in range(len(clusters))], axis=1)
    assert own == pytest.approx(table[np.arange(90), labels], abs=1e-6)
    table[np.arange(90), labels] = -np.inf
    assert best == pytest.approx(table.max(axis=1), abs=1e-5)
    assert own.sum() / 2 == pytest.approx(objective(x, labels, 0.3), abs=1e-6)


def test_weights_with_one_cluster_have_no_next() -> None:
    x = points_around_centres(4, 6)
    own, best = weights(x, np.zeros(4, np.int64), Clusters.of(x, np.zeros(4, np.int64), np.ones(4)), -1)
    assert np.isnan(best).all()
    assert own.shape == (4,)


def test_block_solution_ignores_the_order_of_rows() -> None:
    x = points_around_centres(700, 7)
    order = np.random.default_rng(1).permutation(700)
    labels, sums, sizes = solve_block(x, 0.4, seed=2)
    again, _, _ = solve_block(x[order], 0.4, seed=2)
    assert np.array_equal(canonical(again), canonical(labels[order]))
    expected = cluster_sums(x, labels, len(sizes))
    assert np.array_equal(sums, expected[0])
    assert np.array_equal(sizes, expected[1])


def test_merge_joins_the_halves_of_clusters() -> None:
    x = np.repeat(np.eye(12, dtype=np.float32), 10, axis=0)
    halves = np.repeat(np.arange(24), 5)
    sums, sizes = cluster_sums(x, halves, 24)
    assert canonical(merge(sums, sizes, 0.5)).tolist() == [i // 2 for i in range(24)]


def test_empty_and_bad_blocks() -> None:
    none = solve_blocked(lambda i: np.empty((0, 4), np.float32), 3, 0.4)
    assert [part.tolist() for part in none.labels] == [[], [], []]
    assert len(none.clusters) == 0
    assert solve_blocked(lambda i: np.empty((0, 4), np.float32), 0, 0.4).labels == []
    with pytest.raises(DataError, match="row 1 has length 2"):
        solve_blocked(lambda i: np.array([[1, 0], [2, 0]], np.float32), 2, 0.4)
