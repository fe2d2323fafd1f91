"""Splitting: clusters fall into tighter parts, and the parts move as wholes where the objective gains by it.

Moves of single nodes cannot leave a cluster that is a union of two: each node likes its own half too much.
A part that was contracted at a higher threshold can, to another cluster or into one of its own.
"""

from __future__ import annotations

import numpy as np

from rayscan.clustering.contraction import contract, weight_matrix
from rayscan.clustering.objective import F64, I64, Floats, objective
from rayscan.clustering.partition import Partition, compact

LIFTS = (0.05, 0.15)
"""By how much the threshold is raised to cut a cluster into parts."""

LEAST_SHARE = 1e-4
"""Share of the objective that a round of refinement must gain to be followed by another."""

_LEAST_NODES = 4
"""Smaller clusters stay whole: moves of single nodes do as much for them."""

_MOST_NODES = 1024


def tighter_parts(vectors: Floats, sizes: F64, labels: I64, threshold: float) -> I64:
    """Parts of clusters, int64 (M,), without gaps: each cluster contracted on its own at `threshold`."""
    order = np.argsort(labels, kind="stable")
    parts, k = labels.copy(), int(labels.max(initial=-1)) + 1
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if len(members) < _LEAST_NODES:
            continue
        for nodes in np.array_split(members, -(-len(members) // _MOST_NODES)):
            weights = weight_matrix(vectors[nodes], sizes[nodes], threshold)
            parts[nodes] = k + contract(weights, sizes[nodes])
            k += len(nodes)
    return compact(parts)


def refine(partition: Partition, max_rounds: int = 20) -> float:
    """Splits and moves, in place, until a round gains less than LEAST_SHARE; returns the objective gained."""
    value = objective(partition.vectors, partition.labels, partition.threshold, partition.sizes)
    total = 0.0
    for _ in range(max_rounds):
        gained = 0.0
        for lift in LIFTS:
            threshold = partition.threshold + lift
            parts = tighter_parts(partition.vectors, partition.sizes, partition.labels, threshold)
            gained += partition.move_groups(parts)
            gained += partition.move_groups(partition.labels)
            gained += partition.improve()
        total += gained
        if gained <= LEAST_SHARE * abs(value):
            break
    partition.compact()
    return total
