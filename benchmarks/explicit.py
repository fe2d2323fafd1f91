"""What the sums are measured against: contraction and Kernighan–Lin on an explicit complete graph, N² floats.

Plain textbook forms of greedy additive edge contraction and of Kernighan–Lin with joins (both Keuper et al.,
ICCV 2015), compiled but with no trick beyond it. They share no code with rayscan.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


def pair_weights(points: NDArray[np.floating], threshold: float) -> NDArray[np.float64]:
    """Weight of every pair, float64 (N, N); zero on the diagonal."""
    x = points.astype(np.float64)
    weights = x @ x.T - threshold
    np.fill_diagonal(weights, 0)
    return weights


@njit(cache=True)
def greedy_contraction(weights):  # noqa: C901
    """Labels int64 (N,): the pair of largest positive weight is joined until none is. Ties: first pair."""
    w = weights.copy()
    n = len(w)
    alive = np.ones(n, np.bool_)
    label = np.arange(n)
    best = np.empty(n)
    partner = np.zeros(n, np.int64)
    for i in range(n):
        best[i] = -np.inf
        for j in range(i + 1, n):
            if w[i, j] > best[i]:
                best[i], partner[i] = w[i, j], j
    while True:
        i, top = -1, 0.0
        for k in range(n):
            if alive[k] and best[k] > top:
                i, top = k, best[k]
        if i < 0:
            return label
        j = partner[i]
        alive[j] = False
        for k in range(n):
            if label[k] == j:
                label[k] = i
            w[i, k] += w[j, k]
            w[k, i] = w[i, k]
        for k in range(n):
            if not alive[k] or k > j:
                continue
            stale = k == i or partner[k] == i or partner[k] == j
            if not stale and k < i and w[k, i] > best[k]:
                best[k], partner[k] = w[k, i], i
            if stale:
                best[k] = -np.inf
                for m in range(k + 1, n):
                    if alive[m] and w[k, m] > best[k]:
                        best[k], partner[k] = w[k, m], m


@njit(cache=True)
def kernighan_lin(weights, start, max_rounds=100):
    """Labels int64 (N,): pairs of clusters exchange chains of vertices, join or split until nothing gains."""
    n = len(weights)
    label = start.copy()
    members = np.empty(n, np.int64)
    fresh = label.max() + 1
    changed = np.ones(2 * n + 2, np.bool_)
    for _ in range(max_rounds):
        now = np.zeros(2 * n + 2, np.bool_)
        ids = np.unique(label)
        for x in range(len(ids)):
            for y in range(x + 1, len(ids) + 1):
                a = ids[x]
                b = ids[y] if y < len(ids) else fresh
                if not changed[a] and (b == fresh or not changed[b]):
                    continue
                if _exchange(weights, label, a, b, members) > 1e-9:
                    now[a] = now[b] = True
                    if b == fresh:
                        used = np.zeros(2 * n + 2, np.bool_)
                        used[label] = True
                        fresh = 0
                        while used[fresh]:
                            fresh += 1
        if not now.any():
            break
        changed = now
    return label


@njit(cache=True)
def _exchange(weights, label, a, b, members):  # noqa: C901
    """Best prefix of a chain of moves between clusters a and b, or their union; returns the gain."""
    m, size_a = 0, 0
    for v in range(len(label)):
        if label[v] == a or label[v] == b:
            members[m] = v
            size_a += label[v] == a
            m += 1
    if m == 0 or ((size_a == 0 or size_a == m) and b < 0):
        return 0.0
    side = np.empty(m, np.bool_)
    gain = np.zeros(m)
    join = 0.0
    for p in range(m):
        side[p] = label[members[p]] == a
    for p in range(m):
        for q in range(m):
            w = weights[members[p], members[q]]
            if side[p] != side[q]:
                gain[p] += w
                join += 0.5 * w
            else:
                gain[p] -= w
    original = side.copy()
    done = np.zeros(m, np.bool_)
    sequence = np.empty(m, np.int64)
    total, best, length = 0.0, 0.0, 0
    for step in range(m):
        p = -1
        for q in range(m):
            if not done[q] and (p < 0 or gain[q] > gain[p]):
                p = q
        total += gain[p]
        sequence[step] = p
        done[p] = True
        for q in range(m):
            w = weights[members[p], members[q]]
            if not done[q]:
                gain[q] += 2 * w if side[q] == side[p] else -2 * w
        side[p] = not side[p]
        if total > best + 1e-12:
            best, length = total, step + 1
    if join > best and join > 1e-9:
        for p in range(m):
            label[members[p]] = a
        return join
    if best <= 1e-9:
        return 0.0
    for step in range(length):
        p = sequence[step]
        label[members[p]] = b if original[p] else a
    return best


def value(weights: NDArray[np.float64], labels: NDArray[np.integer]) -> float:
    """The objective, pair by pair."""
    same = labels[:, None] == labels[None, :]
    return float(0.5 * np.sum(weights, where=same))
