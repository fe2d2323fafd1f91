"""The strongest search where it is cheapest: up to a few thousand nodes with all their joint weights at hand.

Nodes are points of a small problem or a block, or the heavy super-nodes of a large one. What the heavy
clusters look like is decided by which start is taken, far more than by any later move: one start may end 2
% below another. So several starts are made, each a contraction of small random groups and then of what
these left, followed by moves of single nodes; then the best is crossed with each other one. Nodes that both
keep together become one super-node (the overlap of two partitions), and the problem on these, where the two
differ and nowhere else, is solved again from the best and from scratch.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rayscan.clustering.contraction import contract, weight_matrix
from rayscan.clustering.objective import F32, F64, I64, Floats

_SHARES = (8, 4, 16)
"""Into how many random groups nodes fall that are contracted first, by start. Where only a sample of each
cluster is at hand, heavy clusters cannot swallow their neighbours before these have found themselves."""


def solve_dense(
    vectors: Floats, sizes: F64, threshold: float, *, seed: int = 0, starts: int = 1, greedy: bool = False
) -> I64:
    """Clusters of M nodes, int64 (M,), numbered without gaps; time and memory grow with M².

    `starts` 1 contracts all nodes together, without chance. `greedy` adds a start in the published order, so
    that the result is at least as good as that contraction.
    """
    if not len(vectors):
        return np.empty(0, np.int64)
    weights = weight_matrix(vectors, sizes, threshold)
    rng = np.random.default_rng(seed)
    found = [sweep(weights, contract(weights.copy(), sizes))]
    found += [_start(weights, sizes, rng, _SHARES[i % len(_SHARES)]) for i in range(starts - 1)]
    if greedy:
        found.append(sweep(weights, contract(weights.copy(), sizes, greedy=True)))
    values = [_value(weights, labels) for labels in found]
    order = np.argsort(values)[::-1]
    best: I64 = found[order[0]]
    value = values[order[0]]
    for i in order[1:]:
        best, value = _cross(weights, sizes, best, value, found[i])
    return best


def _start(weights: F32, sizes: F64, rng: np.random.Generator, groups: int) -> I64:
    labels = np.arange(len(sizes))
    for part in np.array_split(rng.permutation(len(sizes)), min(groups, -(-len(sizes) // 2))):
        labels[part] = part[contract(weights[np.ix_(part, part)], sizes[part])]
    return sweep(weights, _contract_parts(weights, sizes, labels))


def _contract_parts(weights: F32, sizes: F64, labels: I64) -> I64:
    """Contraction that keeps nodes of one label together."""
    k, labels = _number(labels)
    if k == len(labels):
        return contract(weights.copy(), sizes)[labels]
    return contract(_aggregate(weights, labels, k), np.bincount(labels, sizes, k).astype(np.float64))[labels]


def _cross(weights: F32, sizes: F64, best: I64, value: float, other: I64) -> tuple[I64, float]:
    """The better of `best` and what a search on its overlap with `other` finds, and its value."""
    k, overlap = _number(best * len(best) + other)
    parent = np.empty(k, np.int64)
    parent[overlap] = best
    reduced = _aggregate(weights, overlap, k)
    kept = sweep(reduced, parent)[overlap]
    for candidate in (kept, _contract_parts(weights, sizes, overlap)):
        labels = sweep(weights, candidate)
        found = _value(weights, labels)
        if found > value:
            best, value = labels, found
    return best, value


def _number(labels: I64) -> tuple[int, I64]:
    values, number = np.unique(labels, return_inverse=True)
    return len(values), number.astype(np.int64)


def sweep(weights: F32, labels: I64, max_rounds: int = 50) -> I64:
    """Labels, numbered without gaps, after nodes moved one by one to their best cluster until none gains."""
    moved = _number(labels)[1]
    _sweep(weights, moved, max_rounds)
    return _number(moved)[1]


@njit(cache=True, nogil=True)
def _sweep(weights: F32, labels: I64, max_rounds: int) -> None:
    m = len(labels)
    score = np.zeros(m + 1)
    members = np.zeros(m + 1, np.int64)
    for v in range(m):
        members[labels[v]] += 1
    n_labels = labels.max() + 1
    for _ in range(max_rounds):
        moved = False
        for v in range(m):
            score[:n_labels] = 0.0
            for u in range(m):
                score[labels[u]] += weights[v, u]
            a = labels[v]
            b, top = -1, 0.0
            for c in range(n_labels):
                if c != a and members[c] > 0 and score[c] > top:
                    b, top = c, score[c]
            if not top > score[a] + 1e-6:
                continue
            if b < 0:
                b = 0
                while members[b] > 0:
                    b += 1
                n_labels = max(n_labels, b + 1)
            members[a] -= 1
            members[b] += 1
            labels[v] = b
            moved = True
        if not moved:
            return


@njit(cache=True, nogil=True)
def _aggregate(weights: F32, labels: I64, k: int) -> F32:
    """Joint weights of groups of nodes, float32 (k, k), zero on the diagonal; sums run in float64."""
    m = len(labels)
    out = np.zeros((k, k), np.float32)
    order = np.argsort(labels)
    row = np.zeros(k)
    for position in range(m):
        v = order[position]
        for u in range(m):
            row[labels[u]] += weights[v, u]
        if position == m - 1 or labels[order[position + 1]] != labels[v]:
            for c in range(k):
                out[labels[v], c] = row[c]
            row[:] = 0.0
            out[labels[v], labels[v]] = 0.0
    return out


@njit(cache=True, nogil=True)
def _value(weights: F32, labels: I64) -> float:
    total = 0.0
    for v in range(len(labels)):
        for u in range(v):
            if labels[u] == labels[v]:
                total += weights[v, u]
    return total
