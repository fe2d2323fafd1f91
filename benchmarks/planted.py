"""Unit vectors with planted clusters: the instances on which clustering is timed and compared.

Cluster sizes follow a bounded Pareto law, as campaigns of scanners do: a few heavy ones, many of a handful.
Part of the points belong to no cluster. Cluster centres share a low-dimensional subspace and a common
direction, so that different clusters resemble each other more than random vectors would: at d = 128 the
cosine is 0.59 ± 0.17 within a cluster and 0.09 ± 0.19 between clusters (`python -m benchmarks.planted`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CENTRE_DIMENSIONS = 9
"""Dimensions of the subspace in which centres vary; fewer would make different clusters more alike."""


def planted(
    n: int,
    seed: int = 0,
    d: int = 128,
    noise: float = 0.3,
    smallest: int = 5,
    largest: float = 0.1,
    spread: float = 0.22,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`n` unit vectors float32 (n, d) in random order, and their planted cluster int64 (n,).

    A share `noise` of the points has a cluster of its own. Sizes of the others lie in
    [smallest, largest * n], with density ∝ size^-2. `spread` is how much points differ in closeness to their
    centre: far ones stay alone, so that it governs how many clusters there are (1,400 of 10,000 points at
    threshold 0.4, and 350 with a spread of 0.05: less work for a solver, and much less of it at large n).
    """
    rng = np.random.default_rng(seed)
    sizes = _sizes(rng, n - round(noise * n), smallest, max(smallest, round(largest * n)))
    sizes = np.concatenate([sizes, np.ones(n - sizes.sum(), np.int64)])
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = _unit(_centres(rng, len(sizes), d))
    closeness = np.clip(rng.normal(0.62, spread, n), 0.05, 0.98)[:, None]  # expected cosine to a twin
    points = np.empty((n, d), np.float32)
    for start in range(0, n, 65536):  # a million points must not need more than a million points' memory
        part = slice(start, start + 65536)
        scatter = _unit(rng.standard_normal((len(labels[part]), d)))
        points[part] = _unit(
            np.sqrt(closeness[part]) * centres[labels[part]] + np.sqrt(1 - closeness[part]) * scatter
        )
    return points, labels


def _sizes(rng: np.random.Generator, total: int, smallest: int, largest: int) -> NDArray[np.int64]:
    sizes: list[int] = []
    left = total
    while left >= smallest:
        u = rng.random()
        size = int(smallest / (1 - u * (1 - smallest / largest)))
        sizes.append(min(size, left))
        left -= sizes[-1]
    return np.array(sizes, np.int64)


def _centres(rng: np.random.Generator, k: int, d: int) -> NDArray[np.float64]:
    spread = np.full(d, 0.005)
    spread[:CENTRE_DIMENSIONS] = 1.0
    centres = rng.standard_normal((k, d)) * np.sqrt(spread / spread.sum())
    centres[:, 0] += 0.45
    return centres


def _unit(x: NDArray[np.floating]) -> NDArray[np.floating]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _describe(n: int = 4000) -> str:
    points, labels = planted(n)
    cosines = points @ points.T
    same = (labels[:, None] == labels[None, :]) & ~np.eye(n, dtype=bool)
    other = labels[:, None] != labels[None, :]
    return (
        f"{n} points, {labels.max() + 1} clusters, largest {np.bincount(labels).max()}: "
        f"cosine {cosines[same].mean():.2f} ± {cosines[same].std():.2f} within, "
        f"{cosines[other].mean():.2f} ± {cosines[other].std():.2f} between"
    )


if __name__ == "__main__":
    print(_describe())
