"""Contraction: clusters grow from single nodes by joining pairs of positive weight, best pair first.

The joint weight of two clusters is ⟨F_A, F_B⟩ − θ n_A n_B, so joining adds feature sums and nothing else. Two
orders: by the weight itself, which is greedy additive edge contraction (Keuper et al., ICCV 2015), and by
the weight over √(n_A n_B), which lets small clusters finish before heavy ones swallow them and nearly always
gives the better start.

`contract` works on a matrix of at most a few thousand nodes; more are solved in blocks. The matrix is
float32: its drift can change which pair comes first, never the value of a partition, which is computed from
the sums. `greedy.py` keeps the published order to the last pair, for any number of nodes and without
a matrix.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rayscan.clustering.objective import F32, F64, I64, Floats

_EXACT_MAX = {"nnan", "nsz"}  # lets the compiler use vector instructions for a maximum, and nothing else


def weight_matrix(sums: Floats, sizes: F64, threshold: float) -> F32:
    """Joint weight of every two nodes, float32 (M, M), and 0 on the diagonal."""
    left = np.concatenate([sums, sizes[:, None]], axis=1, dtype=np.float32)
    right = np.concatenate([sums, -threshold * sizes[:, None]], axis=1, dtype=np.float32)
    weights = left @ right.T
    np.fill_diagonal(weights, 0)
    return weights


def contract(weights: F32, sizes: F64, *, greedy: bool = False) -> I64:
    """Cluster of each node, int64 (M,): contraction until no two clusters have positive joint weight.

    `weights` (M, M), with zero diagonal, is overwritten; `sizes` (M,) are points per node. `greedy` joins the
    pair of largest weight, else the pair of largest weight over √(n_A n_B). Time and memory grow with M².
    """
    scale = np.ones(len(sizes)) if greedy else 1 / np.sqrt(sizes)
    labels: I64 = _contract(weights, scale.astype(np.float32), greedy)
    return labels


@njit(cache=True, nogil=True, fastmath=_EXACT_MAX)
def _contract(weights: F32, scale: F32, greedy: bool) -> I64:
    """A node that was joined to another has scale 0, so it never scores again.

    Each node knows its best partner; where that partner was joined away, the old score stays as a bound from
    above and the row is searched only when the bound comes out on top.
    """
    m = len(scale)
    parent = np.arange(m)
    best, partner = np.zeros(m, np.float32), np.zeros(m, np.int64)
    exact = np.zeros(m, np.bool_)
    for i in range(m):
        best[i], partner[i] = _best_in_row(weights[i], scale, i)
        exact[i] = True
    while True:
        i = _top(best)
        if not best[i] > 0.0:
            break
        if exact[i]:
            i, j = min(i, partner[i]), max(i, partner[i])
            parent[j] = i
            if not greedy:
                scale[i] = 1 / np.sqrt(1 / scale[i] ** 2 + 1 / scale[j] ** 2)
            scale[j], best[j] = 0.0, 0.0
            _join(weights, scale, best, partner, exact, i, j)
        best[i], partner[i] = _best_in_row(weights[i], scale, i)
        exact[i] = True
    for k in range(m):  # a parent has a smaller number, so it is final already
        parent[k] = parent[parent[k]]
    return parent


@njit(cache=True, nogil=True)
def _join(weights: F32, scale: F32, best: F32, partner: I64, exact: I64, i: int, j: int) -> None:
    """Row and column i take up those of j; other nodes compare i with the best partner they knew."""
    for k in range(len(scale)):
        weights[i, k] += weights[j, k]
    weights[i, i] = 0.0
    for k in range(len(scale)):
        if scale[k] == 0.0 or k == i:
            continue
        weights[k, i] = weights[i, k]
        score = weights[i, k] * scale[i] * scale[k]
        if score >= best[k]:
            best[k], partner[k], exact[k] = score, i, True
        elif partner[k] == i or partner[k] == j:
            exact[k] = False


@njit(cache=True, nogil=True, fastmath=_EXACT_MAX)
def _top(values: F32) -> int:
    top = values[0]
    for k in range(len(values)):
        top = max(top, values[k])
    i = 0
    while values[i] != top:
        i += 1
    return i


@njit(cache=True, nogil=True, fastmath=_EXACT_MAX)
def _best_in_row(row: F32, scale: F32, i: int) -> tuple[np.float32, int]:
    top = np.float32(0.0)
    for k in range(len(row)):
        top = max(top, row[k] * scale[k])
    partner = 0
    if top > 0.0:
        while row[partner] * scale[partner] != top:
            partner += 1
    return top * scale[i], partner
