"""A partition of nodes held in memory while it is being improved: single nodes move, and groups as wholes.

What a node scored with the clusters stays known when groups have moved in between: only clusters that
changed are compared again. That makes a round of refinement cost a fraction of a first pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayscan.clustering.moves import Clusters, Scorer, apply, propose, touched
from rayscan.clustering.objective import F32, F64, I64, Floats


@dataclass
class Partition:
    """Nodes with their clusters and what is known of their scores: a search that can be carried on.

    `vectors` (M, d) are points (float32) or feature sums (float64) of `sizes` (M,) points each. `labels`
    (M,) number `clusters`, which may hold other nodes besides and become empty. `changed` (K,) marks
    clusters that changed since `memory` was written.
    """

    vectors: Floats
    sizes: F64
    threshold: float
    labels: I64
    clusters: Clusters
    memory: F32 | None = None
    changed: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        points = self.vectors.dtype == np.float32
        self.means: F32 = self.vectors if points else (self.vectors / self.sizes[:, None]).astype(np.float32)

    @classmethod
    def of(cls, vectors: Floats, sizes: F64, labels: I64, threshold: float) -> Partition:
        labels = compact(labels)
        return cls(vectors, sizes, threshold, labels, Clusters.of(vectors, labels, sizes))

    def improve(self, max_rounds: int = 1000, most: int | None = None) -> float:
        """Rounds of moves until none gains; returns the objective gained.

        With `most`, nodes only move to so many clusters, the heaviest.
        """
        total = 0.0
        for _ in range(max_rounds):
            scorer = Scorer(self.clusters, self.threshold, self.changed, most)
            found, self.memory = propose(self.means, self.sizes, self.labels, scorer, self.memory)
            v, source = found.nodes, self.labels[found.nodes]
            self.clusters, target, gained = apply(
                self.clusters, self.vectors[v], self.sizes[v], source, found.targets, v, self.threshold
            )
            self.labels[v] = target
            self.changed = touched(len(self.clusters), None, source, target)
            total += gained
            if gained == 0:
                break
        return total

    def move_groups(self, groups: I64) -> float:
        """The same with groups of nodes moving as wholes; returns the objective gained.

        `groups` (M,) numbers parts of clusters from 0. A node that is alone in its group does not move.
        """
        members = np.bincount(groups)
        chosen = np.flatnonzero(members > 1)
        if not len(chosen):
            return 0.0
        number = np.full(len(members), -1, np.int64)
        number[chosen] = np.arange(len(chosen))
        nodes = np.flatnonzero(number[groups] >= 0)
        group = number[groups[nodes]]
        parts = Clusters.of(self.vectors[nodes], group, self.sizes[nodes], len(chosen))
        parent = np.empty(len(chosen), np.int64)
        parent[group] = self.labels[nodes]
        inner = Partition(parts.sums, parts.sizes, self.threshold, parent.copy(), self.clusters)
        gained = inner.improve()
        if gained > 0:
            before = self.labels[nodes]
            self.labels[nodes] = inner.labels[group]
            self._follow(inner.clusters, before, self.labels[nodes])
        return gained

    def _follow(self, clusters: Clusters, before: I64, after: I64) -> None:
        if self.memory is not None:
            self.changed = touched(len(clusters), self.changed, before, after)
        self.clusters = clusters
        self.compact()

    def compact(self) -> None:
        """Drops empty clusters and numbers the others anew, in the order they had."""
        held = self.clusters.sizes > 0
        self.labels = (np.cumsum(held) - 1)[self.labels]
        self.clusters = Clusters(self.clusters.sums[held], self.clusters.sizes[held])
        self.changed = None if self.changed is None else self.changed[held]


def compact(labels: I64) -> I64:
    """The same partition numbered 0 to K-1 without gaps, in the order of the numbers it had."""
    used = np.zeros(int(labels.max(initial=-1)) + 1, bool)
    used[labels] = True
    number: I64 = np.cumsum(used) - 1
    return number[labels]
