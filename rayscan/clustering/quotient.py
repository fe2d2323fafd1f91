"""The quotient graph: clusters as nodes, and for each the others that are nearest to it.

The graph of all pairs of K clusters is complete; kept are the few nearest of each by mean similarity. Between
the clusters of a good solution joint weights are negative: an edge says how far from merging two are, and
`(similarity − θ) n_A n_B` what joining them would add to the objective.
"""

from __future__ import annotations

import numpy as np

from rayscan.clustering.moves import Clusters
from rayscan.clustering.objective import F64, I64

_CELLS = 1 << 22  # similarities that are formed at a time: 100 MB with what sorts them


def nearest_clusters(clusters: Clusters, most: int) -> tuple[I64, F64]:
    """The `most` nearest others of each of K clusters, int64 (K, k), and their similarity, float64 (K, k).

    Nearest first, of equals the lower number; k is `most`, or K − 1 where there are fewer. The similarity is
    the mean cosine of all pairs of points, ⟨F_A, F_B⟩ / (n_A n_B). Time O(K² d).
    """
    means = clusters.sums / np.maximum(clusters.sizes, 1)[:, None]
    k = max(0, min(most, len(means) - 1))
    index, similarity = np.empty((len(means), k), np.int64), np.empty((len(means), k))
    step = max(1, _CELLS // max(len(means), 1))
    for start in range(0, len(means) if k else 0, step):
        part = slice(start, start + step)
        found = means[part] @ means.T
        rows = np.arange(len(found))
        found[rows, start + rows] = -np.inf
        best = np.argpartition(-found, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(found, best, axis=1)
        order = np.lexsort((best, -values), axis=1)
        index[part] = np.take_along_axis(best, order, axis=1)
        similarity[part] = np.take_along_axis(values, order, axis=1)
    return index, similarity
