"""Moves: exact bounds against a plain scan, monotone objective, independence of order and division."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from cc_oracles import pair_weights, points_around_centres
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.clustering import objective, products_on
from rayscan.clustering.moves import NEW, Clusters, Scorer, apply, best_others, propose
from rayscan.clustering.objective import cluster_sums
from rayscan.clustering.partition import Partition


def scores(x: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """Weight of each point to each cluster without itself, (N, K), pair by pair."""
    w = pair_weights(x, threshold)
    return np.stack([w[:, labels == c].sum(axis=1) for c in range(labels.max() + 1)], axis=1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.2, 0.8))
def test_proposals_are_those_of_a_plain_scan(seed: int, threshold: float) -> None:
    x = points_around_centres(60, seed)
    labels = np.unique(np.random.default_rng(seed).integers(12, size=60), return_inverse=True)[1]
    clusters = Clusters.of(x, labels, np.ones(60))
    found, _ = propose(x, np.ones(60), labels, Scorer(clusters, threshold))
    table = scores(x, labels, threshold)
    own = table[np.arange(60), labels].copy()
    table[np.arange(60), labels] = -np.inf
    gain = np.maximum(table.max(axis=1), 0) - own
    sure = np.abs(gain) > 1e-4
    alone = (table.max(axis=1) <= 0) & (clusters.sizes[labels] == 1)
    expected = np.flatnonzero((gain > 0) & ~alone & sure)
    assert set(expected) <= set(found.nodes.tolist()) <= set(expected) | set(np.flatnonzero(~sure).tolist())
    reached = np.where(found.targets == NEW, 0, table[found.nodes, np.maximum(found.targets, 0)])
    assert reached - own[found.nodes] == pytest.approx(gain[found.nodes], abs=1e-4)
    assert found.gains == pytest.approx(gain[found.nodes], abs=1e-4)


@pytest.mark.parametrize("heavy_rounds", [0, 4])
def test_memory_proposes_what_a_full_comparison_would(heavy_rounds: int) -> None:
    """Bounds carried over rounds, with columns skipped or cut off, must not lose a move."""
    x = points_around_centres(3000, 11, k=80, d=12)
    one, threshold = np.ones(3000), 0.55
    labels, memory, changed = np.arange(3000) // 3, None, None
    clusters = Clusters.of(x, labels, one)
    for i in range(16):
        most = 30 if i < heavy_rounds else None
        found, memory = propose(x, one, labels, Scorer(clusters, threshold, changed, most), memory)
        full, _ = propose(x, one, labels, Scorer(clusters, threshold))
        strong = full.gains > 1e-4
        lost = set(full.nodes[strong].tolist()) - set(found.nodes.tolist())
        assert bool(lost) == (i < heavy_rounds)  # the cut leaves moves out, and later rounds find them
        v, source = found.nodes, labels[found.nodes]
        clusters, target, gained = apply(clusters, x[v], one[v], source, found.targets, v, threshold)
        if gained == 0:
            break
        labels[v] = target
        changed = np.zeros(len(clusters), bool)
        changed[source[target != source]] = changed[target[target != source]] = True
    assert gained == 0 or len(found.nodes) < 300


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.2, 0.8))
def test_applied_moves_gain_exactly_what_they_claim(seed: int, threshold: float) -> None:
    """Also when every second node proposes nonsense: only moves that gain are made."""
    rng = np.random.default_rng(seed)
    x = points_around_centres(80, seed)
    labels = rng.integers(6, size=80)
    clusters = Clusters.of(x, labels, np.ones(80), 6)
    target = rng.integers(-1, 6, 80)
    before = objective(x, labels, threshold)
    after, final, gained = apply(clusters, x, np.ones(80), labels, target, np.arange(80), threshold)
    assert gained >= 0
    assert objective(x, final, threshold) - before == pytest.approx(gained, abs=1e-9)
    sums, sizes = cluster_sums(x, final, len(after))
    assert after.sums == pytest.approx(sums, abs=1e-9)
    assert np.array_equal(after.sizes, sizes)
    order = rng.permutation(80)
    again, shuffled, _ = apply(
        clusters, x[order], np.ones(80), labels[order], target[order], order, threshold
    )
    assert np.array_equal(shuffled, final[order])
    assert np.array_equal(again.sums, after.sums)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.1, 0.8))
def test_improve_ends_where_no_single_move_gains(seed: int, threshold: float) -> None:
    x = points_around_centres(70, seed)
    start = np.random.default_rng(seed).integers(9, size=70)
    partition = Partition.of(x, np.ones(70), start, threshold)
    gained = partition.improve()
    partition.compact()
    labels = partition.labels
    assert len(partition.clusters) == labels.max() + 1
    assert objective(x, labels, threshold) == pytest.approx(objective(x, start, threshold) + gained, abs=1e-6)
    table = scores(x, labels, threshold)
    own = table[np.arange(70), labels].copy()
    table[np.arange(70), labels] = 0
    assert (np.maximum(table.max(axis=1), 0) - own).max() < 1e-4


def test_float32_drift_cannot_lower_the_objective() -> None:
    """A huge cluster makes float32 scores wrong by more than the gains: float64 has the last word."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 8)) * 0.02 + np.eye(8)[0]
    x[-200:] = rng.standard_normal((200, 8))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    start = np.zeros(20_000, np.int64)
    start[rng.permutation(20_000)[:10_000]] = 1
    values = [objective(x, start, 0.999)]
    partition = Partition.of(x, np.ones(len(x)), start, 0.999)
    for _ in range(4):
        gained = partition.improve(max_rounds=1)
        values.append(objective(x, partition.labels, 0.999))
        assert values[-1] - values[-2] == pytest.approx(gained, abs=1e-4)
    assert all(b >= a for a, b in pairwise(values))


def test_a_million_points_move_in_and_out_of_one_cluster() -> None:
    """Sums of a million need float64; what is gained is known in closed form."""
    n, strays = 1_000_000, 50
    x = np.zeros((n, 2), np.float32)
    x[:, 0] = 1
    x[:strays] = [0, 1]
    start = np.zeros(n, np.int64)
    start[-strays:] = np.arange(1, strays + 1)
    partition = Partition.of(x, np.ones(n), start, 0.75)
    gained = partition.improve()
    partition.compact()
    assert partition.clusters.sizes.tolist() == [n - strays, strays]
    inside, rest = n - strays, n - 2 * strays
    joined = 0.25 * (inside * (inside - 1) - rest * (rest - 1)) / 2  # pairs of strays stay together
    assert gained == pytest.approx(joined + 0.75 * strays * rest, rel=1e-12)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
        ),
    ],
)
def test_torch_finds_what_numpy_does(device: str) -> None:
    x, one, start = points_around_centres(3000, 13, k=80, d=24), np.ones(3000), np.arange(3000) // 3
    numpy, torch_ = (Partition.of(x, one, start, 0.5) for _ in range(2))
    numpy.improve()
    with products_on(device):
        torch_.improve()
    a, b = (objective(x, partition.labels, 0.5) for partition in (numpy, torch_))
    assert b == pytest.approx(a, rel=1e-3)  # another device may round otherwise and propose in another order
    scorer = Scorer(numpy.clusters, 0.5)
    scorer.moved.matrix.flags.writeable = False  # as it comes from Ray
    score, target = best_others(x, numpy.labels, scorer)
    with products_on(device):
        found = best_others(x, numpy.labels, scorer)
    assert found[0] == pytest.approx(score, abs=1e-4)
    assert (found[1] == target).mean() > 0.999


def test_best_others_without_other_clusters() -> None:
    x = points_around_centres(5, 0)
    score, target = best_others(
        x, np.zeros(5, np.int64), Scorer(Clusters.of(x, np.zeros(5, np.int64), np.ones(5)), 0)
    )
    assert (target == NEW).all()
    assert (score < -1e29).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.1, 0.7))
def test_groups_move_as_wholes_and_what_is_remembered_stays_right(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    x = points_around_centres(80, seed)
    partition = Partition.of(x, np.ones(80), rng.integers(9, size=80), threshold)
    partition.improve(max_rounds=2)
    before, value = partition.labels.copy(), objective(x, partition.labels, threshold)
    groups = np.unique(before * 3 + rng.integers(3, size=80), return_inverse=True)[1]
    gained = partition.move_groups(groups)
    assert objective(x, partition.labels, threshold) - value == pytest.approx(gained, abs=1e-6)
    assert all(len(np.unique(partition.labels[groups == g])) == 1 for g in range(groups.max() + 1))
    sums, sizes = cluster_sums(x, partition.labels, len(partition.clusters))
    assert partition.clusters.sums == pytest.approx(sums, abs=1e-9)
    assert np.array_equal(partition.clusters.sizes, sizes)
    partition.improve()  # with the memory from before the groups moved
    table = scores(x, np.unique(partition.labels, return_inverse=True)[1], threshold)
    own = table[np.arange(80), np.unique(partition.labels, return_inverse=True)[1]].copy()
    table[np.arange(80), np.unique(partition.labels, return_inverse=True)[1]] = 0
    assert (np.maximum(table.max(axis=1), 0) - own).max() < 1e-4
