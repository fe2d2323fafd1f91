"""The quotient graph against pairs of points."""

from __future__ import annotations

import numpy as np
import pytest

from rayscan.clustering import Clusters
from rayscan.clustering.quotient import nearest_clusters


@pytest.mark.parametrize("cells", [5, 1 << 22])
def test_the_nearest_by_the_mean_over_pairs(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayscan.clustering.quotient._CELLS", cells)
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 6)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    labels = np.arange(40) % 7
    index, similarity = nearest_clusters(Clusters.of(points, labels, np.ones(40)), 2)
    pairs = points.astype(np.float64) @ points.astype(np.float64).T
    mean = np.array([[pairs[np.ix_(labels == a, labels == b)].mean() for b in range(7)] for a in range(7)])
    np.fill_diagonal(mean, -np.inf)
    assert index.tolist() == np.argsort(-mean, axis=1)[:, :2].tolist()
    assert similarity == pytest.approx(-np.sort(-mean, axis=1)[:, :2], abs=1e-6)


def test_equally_near_ones_come_in_their_order() -> None:
    index, _ = nearest_clusters(Clusters(np.ones((4, 2)), np.ones(4)), 9)
    assert index.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_none_and_one_cluster() -> None:
    assert nearest_clusters(Clusters(np.empty((0, 0)), np.empty(0)), 3)[0].shape == (0, 0)
    assert nearest_clusters(Clusters(np.ones((1, 2)), np.ones(1)), 3)[0].shape == (1, 0)
