"""The quotient graph against pairs of points."""

from __future__ import annotations

import numpy as np

from rayscan.clustering import Clusters
from rayscan.clustering.quotient import quotient_graph


def test_edges_are_sums_over_pairs_and_lead_to_the_nearest() -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((40, 6)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    labels = np.arange(40) % 7
    graph = quotient_graph(Clusters.of(points, labels, np.ones(40)), 0.3, nearest=2)
    pairs = points.astype(np.float64) @ points.astype(np.float64).T
    mean = np.array([[pairs[np.ix_(labels == a, labels == b)].mean() for b in range(7)] for a in range(7)])
    assert {a: data["size"] for a, data in graph.nodes(data=True)} == dict(enumerate(np.bincount(labels)))
    for a, b, edge in graph.edges(data=True):
        block = pairs[np.ix_(labels == a, labels == b)]
        assert np.isclose(edge["weight"], (block - 0.3).sum(), atol=1e-4)
        assert np.isclose(edge["similarity"], block.mean(), atol=1e-6)
    np.fill_diagonal(mean, -np.inf)
    expected = {frozenset((a, int(b))) for a in range(7) for b in np.argsort(-mean[a])[:2]}
    assert {frozenset(edge) for edge in graph.edges} == expected


def test_none_and_one_cluster() -> None:
    assert len(quotient_graph(Clusters(np.empty((0, 0)), np.empty(0)), 0.3)) == 0
    alone = quotient_graph(Clusters(np.ones((1, 2)), np.ones(1)), 0.3)
    assert (len(alone), alone.number_of_edges()) == (1, 0)
