"""Vectors on a plane, for the eye. Principal components: quick, exact, and the same on every run.

Distances in the picture are those of the two directions of most variance; clusters that differ in
others overlap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayscan.errors import DataError


def pca_2d(vectors: NDArray[np.float32], seed: int = 0) -> NDArray[np.float32]:
    """Coordinates of `vectors` (N, d) along their two principal components, float32 (N, 2).

    Each component points to where its largest loading is positive, so that runs can be compared.
    Directions without variance give zeros. `seed` is for projections that draw at random; this one does
    not.
    """
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise DataError(f"vectors of shape {vectors.shape} cannot be projected; give finite rows (N, d)")
    out = np.zeros((len(vectors), 2), np.float32)
    if not vectors.size:
        return out
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :2]
    axes *= np.where(values[::-1][:2] > 1e-12 * max(values[-1], 1e-300), 1, 0)
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    axes *= np.where(largest < 0, -1, 1)
    out[:, : axes.shape[1]] = centred @ axes
    return out
