"""The objective of correlation clustering on inner products, and what every solver needs to agree on.

For points e_i and a threshold θ the objective is Σ (⟨e_i, e_j⟩ − θ) over the pairs i < j that share a
cluster. With the feature sum F_C = Σ_{i∈C} e_i and n_C = |C| it equals

    ½ Σ_C (‖F_C‖² − Σ_{i∈C} ‖e_i‖² − θ (n_C² − Σ_{i∈C} 1)),

so it costs O(N d), no pair is ever built, and the sum is kept in float64: it holds for clusters of a million.
A super-node stands for several points through their feature sum and their number. With these in place of e_i
and 1 the same formula counts the pairs between different super-nodes and leaves out the pairs inside each,
which no partition of super-nodes can change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from rayscan.errors import DataError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

UNIT_TOLERANCE = 1e-2
"""How far a norm may be from 1; vectors that went through bfloat16 or were quantised stay inside."""


_ROWS = 1 << 16  # normalised at a time


def check_embeddings(embeddings: ArrayLike, *, normalise: bool = False) -> F32:
    """The embeddings as contiguous float32 (N, d), checked: two axes, finite, of length 1.

    With `normalise` each row is divided by its length first; a row of length 0 stays an error.
    Raises DataError that names the first row at fault.
    """
    vectors = np.asarray(embeddings)
    if vectors.ndim != 2:
        raise DataError(f"embeddings must have shape (sequences, dimensions), not {vectors.shape}")
    if vectors.dtype.kind not in "fiu":
        raise DataError(f"embeddings must be numbers, not {vectors.dtype}")
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    _refuse_first(~np.isfinite(norms), "is not finite (NaN or infinity): embed it again or leave it out")
    if normalise:
        _refuse_first(norms == 0, "has length 0 and cannot be normalised: leave it out")
        unit = np.empty(vectors.shape, np.float32)
        for start in range(0, len(unit), _ROWS):  # in float64, which holds lengths that float32 does not
            part = slice(start, start + _ROWS)
            unit[part] = vectors[part] / norms[part, None]
        return unit
    off = np.abs(norms - 1) > UNIT_TOLERANCE
    if off.any():
        _refuse_first(off, f"has length {norms[off][0]:.4g}, not 1: normalise it if that is meant")
    return np.ascontiguousarray(vectors, np.float32)


def _refuse_first(bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise DataError(f"embedding of row {int(np.argmax(bad))} {what} ({int(bad.sum())} such rows)")


def check_sums(sums: ArrayLike, sizes: ArrayLike) -> tuple[F64, F64]:
    """Feature sums float64 (M, d) and sizes float64 (M,) of super-nodes, checked like embeddings."""
    vectors, counts = np.ascontiguousarray(sums, np.float64), np.asarray(sizes, np.float64)
    if vectors.ndim != 2 or counts.shape != (len(vectors),):
        raise DataError(f"sums {vectors.shape} need shape (M, d), and sizes {counts.shape} shape (M,)")
    if not (counts >= 1).all():
        raise DataError("sizes of super-nodes must be 1 or more")
    norms = np.linalg.norm(vectors, axis=1)
    _refuse_first(~np.isfinite(norms), "is not finite (NaN or infinity): compute it again or leave it out")
    _refuse_first(norms > counts * (1 + UNIT_TOLERANCE), "is longer than a sum of that many unit vectors")
    return vectors, counts


def check_threshold(threshold: float) -> float:
    """The threshold as a float. Any finite number is allowed; outside [-1, 1] the answer is trivial."""
    value = float(threshold)
    if not np.isfinite(value):
        raise DataError(f"threshold must be a finite number, not {value}")
    return value


def canonical(labels: ArrayLike) -> I64:
    """The same partition with clusters numbered 0, 1, ... in the order of their first members, int64 (N,)."""
    _, first, inverse = np.unique(np.asarray(labels), return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def cluster_sums(vectors: Floats, labels: I64, k: int, sizes: Floats | None = None) -> tuple[F64, F64]:
    """Feature sums float64 (k, d) and numbers of points float64 (k,) of clusters 0 to k-1.

    `vectors` are points, or sums of super-nodes that stand for `sizes` points each.
    """
    sums = np.zeros((k, vectors.shape[1]))
    add_rows(sums, vectors, labels)
    return sums, np.bincount(labels, sizes, k).astype(np.float64)


@njit(cache=True, nogil=True)
def add_rows(sums: F64, vectors: Floats, labels: I64) -> None:
    """sums[labels[i]] += vectors[i], in the order of the rows."""
    for i in range(vectors.shape[0]):
        c = labels[i]
        for j in range(vectors.shape[1]):
            sums[c, j] += vectors[i, j]


def objective(
    embeddings: Floats, labels: ArrayLike, threshold: float, sizes: ArrayLike | None = None
) -> float:
    """Sum of (similarity - threshold) over all pairs that share a cluster; float64, time O(N d).

    `embeddings` (N, d), `labels` (N,) of any integers. With `sizes` (N,) the rows are super-nodes, feature
    sums of that many points each; pairs of points inside one super-node are then left out.
    """
    vectors = np.asarray(embeddings)
    labels = np.asarray(labels)
    if labels.shape != (len(vectors),):
        raise DataError(f"{len(vectors)} embeddings need as many labels, not {labels.shape}")
    if not len(vectors):
        return 0.0
    weights = np.ones(len(vectors)) if sizes is None else np.asarray(sizes, np.float64)
    clusters = canonical(labels)
    sums, counts = cluster_sums(vectors, clusters, int(clusters.max()) + 1, weights)
    alone = np.einsum("ij,ij->", vectors, vectors, dtype=np.float64)
    products = np.einsum("ij,ij->", sums, sums) - alone
    return float(0.5 * (products - threshold * (counts @ counts - weights @ weights)))
