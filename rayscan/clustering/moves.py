"""Local moves: a node leaves its cluster for a better one, or for a new one, if the objective grows by it.

The gain of moving v from A to B is W(v, B) − W(v, A∖v), with W(v, B) = ⟨s_v, F_B⟩ − θ m_v n_B. A round has
two halves:

*propose* compares every node with all clusters at once, as float32 matrix products against sums that stay
frozen meanwhile, so that nodes can be divided among tasks in any way;
*apply* takes the proposals in an order that depends on nothing but their gains and ids, computes each gain
again in float64 from the sums as they now are, and makes the move only if it still gains.

Every round therefore raises the full objective, however many tasks propose at the same time. Three exact
bounds spare most products. A node's best other cluster is remembered, and later rounds compare the node
only with the clusters that changed, unless the remembered score beats its own. By Cauchy–Schwarz W(v, B) ≤
m_v (‖F_B‖ − θ n_B) for unit points, so clusters come in the order of that bound and a tile of nodes stops
at the first that cannot beat any of them. A global bound on how far all clusters drifted was measured and
prunes next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from rayscan.clustering.objective import F32, F64, I64, UNIT_TOLERANCE, Floats, cluster_sums
from rayscan.clustering.products import NEVER, Tops, products, tile

NEW = -1
"""Target of a move into a cluster of its own."""

LEAST_GAIN = 1e-6
"""Moves that gain less are not made: far below any use, and far above float64 rounding for single points. For
super-nodes of millions, whose weights reach 10¹², monotony holds to float64 rounding of these."""


@dataclass(frozen=True)
class Clusters:
    """Feature sums float64 (K, d) and numbers of points float64 (K,). A cluster may be empty."""

    sums: F64
    sizes: F64

    @classmethod
    def of(cls, vectors: Floats, labels: I64, sizes: F64, k: int | None = None) -> Clusters:
        return cls(*cluster_sums(vectors, labels, int(labels.max(initial=-1)) + 1 if k is None else k, sizes))

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Proposals:
    """Nodes that may gain by moving, int64 (P,), where to, int64 (P,), and the gain per point, float32 (P,).

    The gain is approximate. A target NEW stands for a new cluster.
    """

    nodes: I64
    targets: I64
    gains: F32


def most_for_a_point(clusters: Clusters, threshold: float) -> F32:
    """What no unit vector can score more than with each cluster, float32 (K,): ‖F_B‖ − θ n_B."""
    norms = np.sqrt(np.einsum("ij,ij->i", clusters.sums, clusters.sums))
    bound: F32 = (norms * (1 + UNIT_TOLERANCE) - threshold * clusters.sizes).astype(np.float32)
    return bound


class Scorer:
    """Clusters prepared for being compared with many nodes: built once per round, used for every block.

    `changed` (K,) marks clusters that gained or lost a node since the memories that come with the nodes were
    written; all of them if there are no memories yet. With `most`, nodes are only compared with so many
    clusters, the heavy ones, where a point could score more than with any other; what is remembered still
    bounds all scores from above, so that a later scorer without `most` finds what was left out.
    """

    def __init__(
        self,
        clusters: Clusters,
        threshold: float,
        changed: NDArray[np.bool_] | None = None,
        most: int | None = None,
    ) -> None:
        self.threshold = threshold
        self.sums = clusters.sums.astype(np.float32)
        self.sizes = clusters.sizes
        self.changed = np.ones(len(clusters), bool) if changed is None else changed
        bound = most_for_a_point(clusters, threshold)
        held = np.flatnonzero(clusters.sizes > 0)
        ranked = held[np.argsort(-bound[held], kind="stable")]
        self.cut = NEVER if most is None or most >= len(ranked) else bound[ranked[most]]
        """No point scores more with a cluster that is left out."""
        changed = self.changed[ranked]
        kept = np.arange(len(ranked)) < (len(ranked) if most is None else most)
        self.moved = _Columns(self, ranked[changed & kept], bound, bool((changed & ~kept).any()))
        self.still = _Columns(self, ranked[~changed & kept], bound, bool((~changed & ~kept).any()))


class _Columns:
    """Some clusters in falling order of the bound on a point's score, and whether others were `left_out`.

    `bound` (C + 1,) ends with the bound on those.
    """

    def __init__(self, scorer: Scorer, ids: I64, bound: F32, left_out: bool) -> None:
        self.ids = ids
        self.bound = np.append(bound[ids], scorer.cut if left_out else NEVER)
        self.rising = -self.bound[:-1]
        bias = (-scorer.threshold * scorer.sizes[self.ids, None]).astype(np.float32)
        self.matrix = np.concatenate([scorer.sums[self.ids], bias], axis=1)
        self.position = np.full(len(scorer.sizes), -1, np.int64)
        self.position[self.ids] = np.arange(len(self.ids))

    def that_beat(self, score: np.float32) -> int:
        """How many may score more; they are the first ones."""
        return int(np.searchsorted(self.rising, -score))


def _own_scores(means: F32, sizes: F64, labels: I64, scorer: Scorer) -> F32:
    """W(v, A∖v) / m_v of each node with the rest of its own cluster, float32 (M,)."""
    products = np.empty(len(means), np.float32)
    for start in range(0, len(means), 8192):
        part = slice(start, start + 8192)
        rest = scorer.sums[labels[part]]
        rest -= means[part] * sizes[part, None].astype(np.float32)
        np.einsum("ij,ij->i", means[part], rest, out=products[part])
    return (products - scorer.threshold * (scorer.sizes[labels] - sizes)).astype(np.float32)


def propose(
    means: F32, sizes: F64, labels: I64, scorer: Scorer, memory: F32 | None = None
) -> tuple[Proposals, F32]:
    """Nodes that seem to gain by a move, and what to remember for the next round, float32 (2, M).

    `means` float32 (M, d) are feature sums over `sizes` (M,): for single points the points themselves.
    `labels` (M,) are their clusters. `memory` is what the last round returned for the same nodes: the score
    with their own cluster, and a bound from above on that with others. `scorer` must mark all clusters that
    changed since.
    """
    if memory is None:
        own, bound = _own_scores(means, sizes, labels, scorer), None
    else:
        own, bound = memory.copy()
        stale = np.flatnonzero(scorer.changed[labels])
        own[stale] = _own_scores(means[stale], sizes[stale], labels[stale], scorer)
    floor = np.maximum(own, 0)
    best, target, reach = _best_others(means, labels, np.arange(len(means)), floor, scorer.moved)
    if bound is not None:
        again = np.flatnonzero(bound > np.maximum(np.maximum(floor, best), scorer.cut))
        older, where, limit = _best_others(
            means, labels, again, np.maximum(floor[again], best[again]), scorer.still
        )
        better = older > best[again]
        best[again[better]], target[again[better]] = older[better], where[better]
        bound[again] = limit
        reach = np.maximum(reach, bound)
    target[best < 0] = NEW
    gain = np.maximum(best, 0) - own
    alone = (target == NEW) & (scorer.sizes[labels] <= sizes)
    moving = np.flatnonzero((gain > 0) & ~alone)
    return Proposals(moving, target[moving], gain[moving]), np.stack([own, reach])


def best_others(means: F32, labels: I64, scorer: Scorer) -> tuple[F32, I64]:
    """Best W(v, B) / m_v over clusters other than the node's own, float32 (M,), and that cluster int64 (M,).

    A node without another cluster gets NEW as its cluster. The scorer must be one for all clusters.
    """
    every = np.arange(len(means))
    best, target, _ = _best_others(means, labels, every, np.full(len(means), NEVER), scorer.moved)
    return best, target


def _best_others(means: F32, labels: I64, rows: I64, floor: F32, columns: _Columns) -> tuple[F32, I64, F32]:
    """Best score, its cluster, and a bound from above on all scores, for `rows` and clusters not their own.

    Only scores above `floor` (same shape as `rows`) matter: others may be missing from the first two results,
    never from the bound. Rows are taken in falling order of the floor, so that those of one tile can stop at
    nearly the same cluster.
    """
    best = np.full(len(rows), NEVER, np.float32)
    target = np.full(len(rows), NEW, np.int64)
    reach = np.full(len(rows), columns.bound[-1], np.float32)
    order = np.argsort(-floor, kind="stable")
    tops, (step, _) = products(columns.matrix), tile()
    for start in range(0, len(rows) if len(columns.ids) else 0, step):
        part = order[start : start + step]
        v = rows[part]
        left = np.concatenate([means[v], np.ones((len(v), 1), np.float32)], axis=1)
        found = _scan(left, columns.position[labels[v]], floor[part], columns, tops)
        best[part], target[part], reach[part] = found
    return best, target, reach


def _scan(left: F32, own: I64, floor: F32, columns: _Columns, tops: Tops) -> tuple[F32, I64, F32]:
    """`_best_others` of one tile of rows; `own` is where their cluster stands among the columns, or -1."""
    best, target = np.full(len(left), NEVER, np.float32), np.full(len(left), NEW, np.int64)
    at, (_, step) = 0, tile()
    while at < (end := columns.that_beat(np.maximum(floor, best).min())):
        stop = min(at + step, end)
        mine = np.flatnonzero((own >= at) & (own < stop))
        value, top = tops(left, at, stop, mine, own[mine] - at)
        better = value > best
        best[better], target[better] = value[better], columns.ids[at + top[better]]
        at = stop
    return best, target, np.maximum(best, columns.bound[at])


@njit(cache=True, nogil=True)
def _gain(node: Floats, size: float, a: int, b: int, sums: F64, sizes: F64, threshold: float) -> float:
    """Exact gain of moving a node from cluster a to b; b < 0 stands for an empty one."""
    with_a, with_b, itself = 0.0, 0.0, 0.0
    for j in range(len(node)):
        x = np.float64(node[j])
        with_a += x * sums[a, j]
        itself += x * x
        if b >= 0:
            with_b += x * sums[b, j]
    loss: float = with_a - itself - threshold * size * (sizes[a] - size)
    return with_b - (threshold * size * sizes[b] if b >= 0 else 0.0) - loss


@njit(cache=True, nogil=True)
def _gains(
    nodes: Floats, weights: F64, source: I64, target: I64, sums: F64, sizes: F64, threshold: float
) -> F64:
    gains = np.empty(len(source))
    for i in range(len(source)):
        gains[i] = _gain(nodes[i], weights[i], source[i], target[i], sums, sizes, threshold)
    return gains


@njit(cache=True, nogil=True)
def _apply(
    order: I64,
    nodes: Floats,
    weights: F64,
    source: I64,
    target: I64,
    sums: F64,
    sizes: F64,
    threshold: float,
    least: float,
) -> float:
    """Moves in `order` those that still gain; writes where a node ends up into `target`. Returns the gain."""
    total = 0.0
    for i in order:
        a, b = source[i], target[i]
        gain = _gain(nodes[i], weights[i], a, b, sums, sizes, threshold)
        if not gain > least:
            target[i] = a
            continue
        total += gain
        for j in range(nodes.shape[1]):
            x = np.float64(nodes[i, j])
            sums[a, j] -= x
            sums[b, j] += x
        sizes[a] -= weights[i]
        sizes[b] += weights[i]
        if sizes[a] < 0.5:  # the last one left: no rounding error may stay behind
            sizes[a] = 0.0
            sums[a] = 0.0
    return total


def apply(
    clusters: Clusters, nodes: Floats, sizes: F64, source: I64, target: I64, ids: I64, threshold: float
) -> tuple[Clusters, I64, float]:
    """Clusters after the proposed moves that truly gain, where each node now is, and the objective gained.

    `nodes` (P, d) are the feature sums of the movers, `sizes` (P,) their points, `source` and `target` (P,)
    their clusters, `ids` (P,) what orders movers of equal gain. Neither the order of the rows nor how they
    were divided among tasks changes the result. The clusters passed in are left as they are.
    """
    sums, counts = clusters.sums, clusters.sizes
    gains = _gains(nodes, sizes, source, target, sums, counts, threshold)
    order = np.lexsort((ids, -gains))
    order = order[(gains[order] > LEAST_GAIN) & (source[order] != target[order])]
    target = target.copy()
    fresh = order[target[order] == NEW]
    target[fresh] = len(counts) + np.arange(len(fresh))
    sums = np.concatenate([sums, np.zeros((len(fresh), sums.shape[1]))])
    counts = np.concatenate([counts, np.zeros(len(fresh))])
    skipped = np.ones(len(target), bool)
    skipped[order] = False
    target[skipped] = source[skipped]
    gained = _apply(order, nodes, sizes, source, target, sums, counts, threshold, LEAST_GAIN)
    return Clusters(sums, counts), target, gained


def touched(k: int, before: NDArray[np.bool_] | None, source: I64, target: I64) -> NDArray[np.bool_]:
    """Which of k clusters gained or lost a node by these moves, besides those marked before; new ones did."""
    changed = np.zeros(k, bool)
    if before is not None:
        changed[: len(before)] = before
    moved = source != target
    changed[source[moved]] = changed[target[moved]] = True
    return changed
