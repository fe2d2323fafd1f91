"""Independent, slow formulations of correlation clustering on explicit pairs, and small instances."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

Weights = NDArray[np.float64]
Labels = NDArray[np.int64]


def points_around_centres(
    n: int, seed: int, k: int = 6, d: int = 16, spread: float = 0.8
) -> NDArray[np.float32]:
    """`n` unit vectors around `k` random directions; a fifth of them anywhere."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((k, d))[rng.integers(k, size=n)] + spread * rng.standard_normal((n, d))
    stray = rng.random(n) < 0.2
    x[stray] = rng.standard_normal((int(stray.sum()), d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def pair_weights(x: NDArray[np.floating], threshold: float) -> Weights:
    y = x.astype(np.float64)
    w = np.array([[a @ b - threshold for b in y] for a in y]).reshape(len(y), len(y))
    np.fill_diagonal(w, 0)
    return w


def value(w: Weights, labels: Labels) -> float:
    return float(sum(w[i, j] for i in range(len(w)) for j in range(i) if labels[i] == labels[j]))


def partitions(n: int) -> Iterator[Labels]:
    """All partitions of n things, as restricted growth strings."""
    labels = np.zeros(n, np.int64)

    def grow(i: int, used: int) -> Iterator[Labels]:
        if i == n:
            yield labels
            return
        for c in range(used + 1):
            labels[i] = c
            yield from grow(i + 1, max(used, c + 1))

    return grow(0, 0)


def optimum(w: Weights) -> float:
    return max(value(w, labels) for labels in partitions(len(w)))


def greedy(w: Weights) -> Labels:
    """Greedy additive edge contraction on the explicit graph."""
    clusters = {i: [i] for i in range(len(w))}
    while True:
        pairs = [
            (-w[np.ix_(a, b)].sum(), i, j) for i, a in clusters.items() for j, b in clusters.items() if i < j
        ]
        best = min(pairs, default=(0.0, 0, 0))
        if best[0] >= 0:
            break
        clusters[best[1]] += clusters.pop(best[2])
    labels = np.empty(len(w), np.int64)
    for i, members in clusters.items():
        labels[members] = i
    return labels


def kernighan_lin(w: Weights, labels: Labels) -> Labels:
    """Best prefix of a chain of moves between every two clusters (or one and nothing), or their union."""
    labels = labels.copy()
    improved = True
    while improved:
        improved = False
        for a in np.unique(labels):
            for b in [*np.unique(labels), labels.max() + 1]:
                if a != b and (labels == a).any():
                    improved |= _exchange(w, labels, a, b)
    return labels


def _exchange(w: Weights, labels: Labels, a: int, b: int) -> bool:
    before = value(w, labels)
    trial, best, gain = labels.copy(), labels.copy(), 1e-9
    left = set(np.flatnonzero((labels == a) | (labels == b)).tolist())
    trial[list(left)] = a
    if value(w, trial) - before > gain:
        best, gain = trial.copy(), value(w, trial) - before
    trial = labels.copy()
    while left:
        flips = {}
        for v in left:
            other = b if trial[v] == a else a
            flips[v] = w[v, trial == other].sum() - w[v, trial == trial[v]].sum()
        v = max(flips, key=lambda u: flips[u])
        trial[v] = b if trial[v] == a else a
        left.remove(v)
        if value(w, trial) - before > gain:
            best, gain = trial.copy(), value(w, trial) - before
    changed = bool((best != labels).any())
    labels[:] = best
    return changed


def upper_bound(w: Weights, rounds: int = 40) -> float:
    """The triangle relaxation, x_ij + x_jk - x_ik <= 1: a bound from above on every partition."""
    n = len(w)
    number = np.zeros((n, n), np.int64)
    i, j = np.triu_indices(n, 1)
    number[i, j] = number[j, i] = np.arange(len(i))
    rows: list[tuple[int, int, int]] = []
    x = (w[i, j] > 0).astype(float)
    bound = float(x @ w[i, j])
    for _ in range(rounds):
        m = x[number]
        np.fill_diagonal(m, 0)
        excess = m[:, :, None] + m[None, :, :] - m[:, None, :] - 1  # [a, b, c]: x_ab + x_bc - x_ac
        a, b, c = np.nonzero(excess > 1e-6)
        keep = (a < c) & (a != b) & (b != c)
        a, b, c = a[keep], b[keep], c[keep]
        if not len(a):
            break
        worst = np.argsort(-excess[a, b, c])[:2000]
        rows += zip(number[a, b][worst], number[b, c][worst], number[a, c][worst], strict=True)
        entries = np.array(rows)
        data = np.tile([1.0, 1.0, -1.0], len(entries))
        table = csr_array(
            (data, (np.repeat(np.arange(len(entries)), 3), entries.ravel())), shape=(len(rows), len(i))
        )
        solved = linprog(-w[i, j], A_ub=table, b_ub=np.ones(len(rows)), bounds=(0, 1), method="highs")
        x, bound = solved.x, -solved.fun
    return bound
