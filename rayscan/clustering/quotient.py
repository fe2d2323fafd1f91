"""The quotient graph: clusters as nodes, joint weights as edges.

The graph of all pairs of K clusters is complete too; kept are the `nearest` others of each by mean
similarity. Between the clusters of a good solution joint weights are negative: an edge says how far from
merging two are.
"""

from __future__ import annotations

import networkx as nx
import numpy as np

from rayscan.clustering.moves import Clusters

_BLOCK = 1024


def quotient_graph(clusters: Clusters, threshold: float, nearest: int = 5) -> nx.Graph:
    """Graph on nodes 0 to K - 1 with attribute `size`; edges have `weight` and `similarity`.

    `weight` is ⟨F_A, F_B⟩ − θ n_A n_B, what joining the two would add to the objective; `similarity` is the
    mean cosine of their pairs, ⟨F_A, F_B⟩ / (n_A n_B). Ties go to the lower number. Takes O(K² d) time and
    O(K) memory.
    """
    sums, sizes = clusters.sums, clusters.sizes
    graph = nx.Graph()
    graph.add_nodes_from((i, {"size": int(n)}) for i, n in enumerate(sizes))
    means = sums / np.maximum(sizes, 1)[:, None]
    most = min(nearest, len(sizes) - 1)
    for start in range(0, len(sizes) if most > 0 else 0, _BLOCK):
        similarity = means[start : start + _BLOCK] @ means.T
        rows = np.arange(len(similarity))
        similarity[rows, rows + start] = -np.inf
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :most]
        for row in rows:
            for other in best[row].tolist():
                a, s = int(row) + start, float(similarity[row, other])
                weight = (s - threshold) * float(sizes[a] * sizes[other])
                graph.add_edge(a, other, weight=weight, similarity=s)
    return graph
