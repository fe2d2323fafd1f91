"""Greedy additive edge contraction in exactly its published order, without the graph.

Keuper et al. (ICCV 2015) join the two clusters of largest joint weight while that is positive. Kept here for
comparison: it merges too much at low thresholds, and `solve` starts better. Memory is O(N d): each cluster
knows the best partner it had when it was last looked at. A pair is never forgotten, because the younger of
two clusters was compared with all others when it came into being; an entry whose partner is gone stays in
the queue as a bound from above, and the cluster is compared again only when that bound comes out on top.

Comparisons run in float32 with a proven error margin; all pairs inside the margin are computed again in
float64. So the order is that of float64 arithmetic on the sums. An explicit graph adds up edge weights
instead and may order pairs differently whose weights agree to about 15 digits. Of exactly equal
pairs the one with the smaller row numbers goes first, as far as both are known as best pairs.
"""

from __future__ import annotations

import heapq

import numpy as np

from rayscan.clustering.objective import F32, F64, I64, Floats

_TILE = 1024
_AT_A_TIME = 1 << 16
"""Pairs that are computed again: where rows are equal, all pairs lie inside the margin."""


def greedy_contraction(sums: Floats, sizes: F64, threshold: float) -> I64:
    """Smallest member of each node's cluster, int64 (M,), after greedy contraction.

    `sums` (M, d) are points or feature sums of `sizes` (M,) points. About one product of a row with
    all clusters for each join: some seconds for 10,000 points.
    """
    table = _Table(sums, sizes, threshold)
    queue: list[tuple[float, int, int, int, int, int]] = []
    tile = max(1, min(_TILE, (1 << 22) // max(len(sums), 1)))
    for start in range(0, len(sums), tile):
        queue += table.entries(np.arange(start, min(start + tile, len(sums))))
    heapq.heapify(queue)
    parent = np.arange(len(sums))
    while queue:
        _, first, second, i, age_first, age_second = heapq.heappop(queue)
        if table.age[i] != (age_first if i == first else age_second):
            continue
        if table.age[first] == age_first and table.age[second] == age_second:
            table.join(first, second)
            parent[second] = i = first
        for entry in table.entries(np.array([i])):
            heapq.heappush(queue, entry)
    for k in range(len(parent)):
        parent[k] = parent[parent[k]]
    return parent


class _Table:
    """Clusters that exist, each named by its smallest member, with an age that grows with every join."""

    def __init__(self, sums: Floats, sizes: F64, threshold: float) -> None:
        self.threshold = threshold
        self.age = np.zeros(len(sums), np.int64)  # -1: joined to another
        self.ids = np.arange(len(sums))
        self.position = np.arange(len(sums))
        self.sums, self.sizes = sums.astype(np.float64), sizes.astype(np.float64)
        self.alive = len(sums)
        self._refresh()

    def _refresh(self) -> None:
        bias = -self.threshold * self.sizes[:, None]
        self.matrix = np.concatenate([self.sums, bias], axis=1, dtype=np.float32)
        self.norms = np.linalg.norm(self.sums, axis=1) + abs(self.threshold) * self.sizes

    def join(self, first: int, second: int) -> None:
        a, b = self.position[first], self.position[second]
        self.sums[a] += self.sums[b]
        self.sizes[a] += self.sizes[b]
        self.sums[b], self.sizes[b] = 0.0, 0.0
        for p in (a, b):
            self.matrix[p, :-1], self.matrix[p, -1] = self.sums[p], -self.threshold * self.sizes[p]
            self.norms[p] = np.linalg.norm(self.sums[p]) + abs(self.threshold) * self.sizes[p]
        self.age[first] += 1
        self.age[second] = -1
        self.alive -= 1
        if self.alive < len(self.ids) // 2:
            self._drop_joined()

    def _drop_joined(self) -> None:
        keep = self.age[self.ids] >= 0
        self.ids, self.sums, self.sizes = self.ids[keep], self.sums[keep], self.sizes[keep]
        self.position[self.ids] = np.arange(len(self.ids))
        self._refresh()

    def entries(self, clusters: I64) -> list[tuple[float, int, int, int, int, int]]:
        """Best pairs: (-weight, first, second, cluster, age of first, age of second), where positive."""
        rows = self.position[clusters]
        left = np.concatenate([self.sums[rows], self.sizes[rows, None]], axis=1, dtype=np.float32)
        scores = left @ self.matrix.T
        scores[np.arange(len(rows)), rows] = -np.inf
        margin = self._margin(rows)
        near = scores + margin >= np.maximum((scores - margin).max(axis=1), 0)[:, None]
        r, c = np.nonzero(near)
        parts = [slice(start, start + _AT_A_TIME) for start in range(0, len(r), _AT_A_TIME)]
        weight = np.concatenate([np.empty(0), *(self._weights(rows[r[part]], c[part]) for part in parts)])
        mine, other = clusters[r], self.ids[c]
        first, second = np.minimum(mine, other), np.maximum(mine, other)
        order = np.lexsort((second, first, -weight, r))
        order = order[(weight[order] > 0) & (self.sizes[c[order]] > 0)]
        best = order[np.flatnonzero(np.diff(r[order], prepend=-1))]
        columns = (-weight, first, second, mine, self.age[first], self.age[second])
        return list(zip(*(column[best].tolist() for column in columns), strict=True))

    def _weights(self, a: I64, b: I64) -> F64:
        """Joint weights of pairs of positions, in float64."""
        weights: F64 = np.einsum("ij,ij->i", self.sums[a], self.sums[b])
        weights -= self.threshold * self.sizes[a] * self.sizes[b]
        return weights

    def _margin(self, rows: I64) -> F32:
        """By how much a float32 score may be wrong: rounding of d + 1 products and of both factors."""
        unit = (self.sums.shape[1] + 8) * 2.0**-24
        left = np.linalg.norm(self.sums[rows], axis=1) + self.sizes[rows]
        margin: F32 = (unit * left[:, None] * self.norms[None, :]).astype(np.float32)
        return margin
