"""Vectors on a plane, for the eye: t-SNE of a sample, and all others placed among it.

Neighbourhoods of the vectors are kept, distances beyond them are not. A sample is drawn once (van der
Maaten and
Hinton, Visualizing data using t-SNE, JMLR 2008, in the implementation of openTSNE, whose cost grows linearly:
Poličar, Stražar and Zupan, JSS 2024), from a start along the principal components, so that the same
vectors give the same map. Any other vector goes to the median place of those of the sample that it is
most alike to: quick, the same whatever else is placed, and a map of last month does not move when this
month is put on it. Traded: what is like nothing in the sample gets a place all the same, so its
similarity comes along.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rayscan.errors import DataError

F32 = NDArray[np.float32]
NEIGHBOURS = 10
PERPLEXITY = 30.0
FEWEST = 10
"""Vectors below which there is no neighbourhood to keep: principal components do then."""
_AT_A_TIME = 1 << 26  # similarities


def draw(vectors: F32, seed: int = 0) -> F32:
    """A place on the plane, float32 (N, 2), for each row of `vectors` (N, d), of length 1.

    Raises DataError for what is not finite.
    """
    start = pca_2d(vectors)
    if len(vectors) < FEWEST or not np.ptp(start):
        return start
    from openTSNE import TSNE, affinity, initialization  # slow to import, and only needed here

    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    options = {"random_state": seed, "n_jobs": 1}
    near = affinity.PerplexityBasedNN(vectors, perplexity=perplexity, method="exact", **options)
    begun = initialization.rescale(start.astype(np.float64))
    method = "bh" if len(vectors) < _FOURIER else "fft"
    tsne = TSNE(negative_gradient_method=method, **_ITERATIONS, **options)
    places = tsne.fit(affinities=near, initialization=begun)
    return np.asarray(places, np.float32)


_FOURIER = 3000  # vectors from which on interpolation costs less than trees
_ITERATIONS = {"early_exaggeration_iter": 150, "n_iter": 350}


def place(vectors: F32, sample: F32, places: F32) -> tuple[F32, F32]:
    """Places (M, 2) of `vectors` (M, d) among a drawn sample (N, d) at `places` (N, 2), N at least 1.

    And the cosine similarity (M,) of each to the vector of the sample that it is most alike to.
    """
    most = min(NEIGHBOURS, len(sample))
    out, alike = np.empty((len(vectors), 2), np.float32), np.empty(len(vectors), np.float32)
    rows = max(1, _AT_A_TIME // max(len(sample), 1))
    for at in range(0, len(vectors), rows):
        part = slice(at, at + rows)
        similarity = torch.from_numpy(vectors[part] @ sample.T)
        found = torch.topk(similarity, most, dim=1)  # ten times as fast as numpy's argpartition
        out[part] = np.median(places[found.indices.numpy()], axis=1)
        alike[part] = found.values[:, 0].numpy()
    return out, alike


def pca_2d(vectors: F32) -> F32:
    """Coordinates of `vectors` (N, d) along their two principal components, float32 (N, 2).

    Each component points to where its largest loading is positive, so that runs can be compared.
    Directions without variance give zeros.
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
