"""Any number of nodes in memory: solve small random blocks, join their super-nodes, then move nodes.

The recipe depends on the size alone. Up to SMALL nodes are one dense problem with several starts. Up to
CHUNK nodes get three or more starts that differ in how pure their super-nodes are; each is moved to a local
optimum, then the best is crossed with the others. More nodes are solved chunk by chunk first. What decides
the heavy clusters is a dense problem over the heaviest super-nodes: it stands for thousands of points and
costs some hundredths of a second, so that many starts are cheap there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayscan.clustering.contraction import contract, weight_matrix
from rayscan.clustering.dense import solve_dense
from rayscan.clustering.moves import Clusters
from rayscan.clustering.objective import F64, I64, Floats, objective
from rayscan.clustering.partition import Partition, compact
from rayscan.keys import hash64

BLOCK = 512
"""Random nodes solved together at the bottom: fewer see too little of a cluster, more cost more."""

SMALL = 2048
"""Nodes that are solved as one dense problem (a matrix of 16 MB)."""

HEAVY = 1024
"""Super-nodes, the largest ones, on which several starts are made."""

NEIGHBOURHOODS = 3
"""Ways in which light super-nodes are divided into neighbourhoods, one after the other. Cheap beside the
rounds of moves that would have to join them otherwise."""

CHUNK = 12_500
"""Nodes that are solved together before super-nodes of several chunks are joined."""

STARTS = 8
"""Starts of a dense problem of SMALL nodes; smaller ones get more, up to MOST_STARTS."""

MOST_STARTS = 64

LIFTS = (0.0, 0.1, 0.05, 0.15)
"""By how much the threshold is raised at the bottom, by start. More leaves purer super-nodes, from which
other heavy clusters grow; which is better differs from one set of vectors to the next."""


FEW_ROUNDS = 4
"""Rounds of moves where more will follow anyway."""

FEW_CLUSTERS = 1024
"""Clusters, the heaviest, that nodes are compared with there. They decide the objective; among the light ones
most time goes by."""


def content_hash(vectors: Floats, seed: int) -> NDArray[np.uint64]:
    """64-bit hash of each row as float32, uint64 (M,). Equal rows have equal hashes."""
    odd = hash64(np.arange(vectors.shape[1]), seed) | np.uint64(1)
    hashes = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), 65536):
        rows = vectors[start : start + 65536].astype(np.float32) + np.float32(0)  # no minus zero
        hashes[start : start + 65536] = rows.view(np.uint32).astype(np.uint64) @ odd
    return hash64(hashes.view(np.int64), seed)


def content_order(vectors: Floats, seed: int) -> I64:
    """A pseudo-random order of rows, int64 (M,): their contents and the seed decide, not where they stand."""
    return np.argsort(content_hash(vectors, seed), kind="stable")


def solve_nodes(
    vectors: Floats, sizes: F64, threshold: float, seed: int = 0, *, thorough: bool = True
) -> Partition:
    """A partition of M nodes in which no single node gains by moving.

    `vectors` are points (float32) or sums (float64) of `sizes` points each, in an order that means nothing.
    Without `thorough` there is one start and a few rounds of moves: enough for a block that is joined to
    others.
    """
    m = len(vectors)
    if m <= SMALL:
        starts = min(MOST_STARTS, STARTS * SMALL // max(m, 1)) if thorough else 1
        labels = solve_dense(vectors, sizes, threshold, seed=seed, starts=starts, greedy=thorough)
        return _improved(vectors, sizes, labels, threshold, thorough)
    if m <= CHUNK and thorough:
        return _best_of(vectors, sizes, threshold, seed, starts=max(3, 30_000 // m))
    if m <= CHUNK:
        return start(vectors, sizes, threshold, seed, thorough=False)
    labels, k = np.empty(m, np.int64), 0
    for i, part in enumerate(np.array_split(np.arange(m), -(-m // CHUNK))):
        solved = start(vectors[part], sizes[part], threshold, seed + i, thorough=False)
        labels[part] = k + solved.labels
        k += len(solved.clusters)
    return _improved(
        vectors, sizes, _join(vectors, sizes, labels, threshold, seed, thorough), threshold, thorough
    )


def start(
    vectors: Floats, sizes: F64, threshold: float, seed: int, lift: float = 0.0, *, thorough: bool = True
) -> Partition:
    """One local optimum, or nearly: random blocks, their super-nodes joined, then single nodes moved.

    `lift` raises the threshold in the blocks, which leaves more and purer super-nodes.
    """
    labels, k = np.empty(len(vectors), np.int64), 0
    order = np.random.default_rng(seed).permutation(len(vectors))
    for part in np.array_split(order, -(-len(order) // BLOCK)):
        labels[part] = k + solve_dense(vectors[part], sizes[part], threshold + lift)
        k = int(labels[part].max()) + 1
    return _improved(
        vectors, sizes, _join(vectors, sizes, labels, threshold, seed, thorough), threshold, thorough
    )


def _improved(vectors: Floats, sizes: F64, labels: I64, threshold: float, thorough: bool) -> Partition:
    partition = Partition.of(vectors, sizes, labels, threshold)
    if thorough:
        partition.improve()
    else:
        partition.improve(FEW_ROUNDS, FEW_CLUSTERS)
    partition.compact()
    return partition


def _join(vectors: Floats, sizes: F64, labels: I64, threshold: float, seed: int, thorough: bool) -> I64:
    nodes, starts = Clusters.of(vectors, labels, sizes), STARTS if thorough else 1
    return merge(nodes.sums, nodes.sizes, threshold, seed, starts=starts, max_rounds=1)[labels]


def merge(
    sums: F64, sizes: F64, threshold: float, seed: int = 0, *, starts: int = STARTS, max_rounds: int = 10
) -> I64:
    """Cluster of each super-node, int64 (M,), numbered without gaps.

    The heaviest are a dense problem. The others are contracted among neighbours; then those of several
    points move, in `max_rounds` rounds at most.
    """
    heaviest = np.argsort(-sizes, kind="stable")
    heavy, light = heaviest[:HEAVY], heaviest[HEAVY:]
    labels = np.empty(len(sums), np.int64)
    labels[heavy] = solve_dense(sums[heavy], sizes[heavy], threshold, seed=seed, starts=starts)
    labels[light] = len(heavy) + _join_light(sums[light], sizes[light], threshold, seed)
    labels = compact(labels)
    moving = np.flatnonzero(sizes > 1)  # single points have rounds of their own
    partition = Partition(
        sums[moving], sizes[moving], threshold, labels[moving], Clusters.of(sums, labels, sizes)
    )
    partition.improve(max_rounds, FEW_CLUSTERS)
    labels[moving] = partition.labels
    return compact(labels)


def _join_light(sums: F64, sizes: F64, threshold: float, seed: int) -> I64:
    """Nodes contracted in neighbourhoods of at most SMALL, then what is left in other ones; int64 (M,)."""
    labels = np.arange(len(sizes))
    for i in range(NEIGHBOURHOODS if len(labels) else 0):
        parts, k = neighbourhoods(sums / sizes[:, None], seed + i), 0
        joined = np.empty(len(sizes), np.int64)
        for part in parts:
            joined[part] = k + contract(weight_matrix(sums[part], sizes[part], threshold), sizes[part])
            k += len(part)
        joined = compact(joined)
        labels = joined[labels]
        if len(parts) == 1:
            break
        nodes = Clusters.of(sums, joined, sizes)
        sums, sizes = nodes.sums, nodes.sizes
    return labels


def neighbourhoods(means: F64, seed: int) -> list[I64]:
    """Nodes cut at the median along random directions until at most SMALL are left together.

    A random projection tree (Dasgupta and Freund, STOC 2008), along directions in which the nodes vary most
    (a step of power iteration): what lies close mostly stays together.
    """
    rng = np.random.default_rng(seed)
    parts = [np.arange(len(means))]
    while len(parts[0]) > SMALL:
        ordered = [part[np.argsort(_along(means[part], rng), kind="stable")] for part in parts]
        parts = [half for part in ordered for half in np.array_split(part, 2)]
    return parts


def _along(means: F64, rng: np.random.Generator) -> F64:
    """Where each node lies along such a direction; not by BLAS, which rounds by its number of threads."""
    means = means - means.mean(axis=0)
    random: F64 = np.einsum("ij,j->i", means, rng.standard_normal(means.shape[1]))
    along: F64 = np.einsum("ij,j->i", means, np.einsum("ij,i->j", means, random))
    return along


def _best_of(vectors: Floats, sizes: F64, threshold: float, seed: int, starts: int) -> Partition:
    """The best of several local optima, crossed with each of the others."""
    found = [start(vectors, sizes, threshold, seed + i, LIFTS[i % len(LIFTS)]) for i in range(starts)]
    values = [objective(vectors, partition.labels, threshold, sizes) for partition in found]
    order = np.argsort(values)[::-1]
    best: Partition = found[order[0]]
    for i in order[1:]:
        cross(best, found[i].labels)
    return best


def cross(best: Partition, other: I64) -> float:
    """Moves as wholes what `best` and `other` both keep together, then each node; the objective gained."""
    pairs = best.labels * (int(other.max()) + 1) + other
    gained = best.move_groups(np.unique(pairs, return_inverse=True)[1].astype(np.int64))
    return gained + best.improve()
