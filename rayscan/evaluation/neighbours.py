"""k nearest neighbours: do sequences of a label lie next to others of it that come from elsewhere?

Neighbours of the same source are masked, since a source is easily recognised and says nothing about who
runs it. The search is exact, tile by tile: each thread keeps the best k of its rows, so memory is N×k.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numpy.typing import NDArray

from rayscan.errors import DataError
from rayscan.evaluation import tiles
from rayscan.evaluation.tiles import Vectors

KS = (1, 3, 5, 7)
NONE = -1


def top_k(
    vectors: Vectors, k: int, exclude: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest of each of `vectors` (N, d) among those of another `exclude` id, nearest first.

    Returns rows int64 (N, k) and similarities float32 (N, k); NONE and -inf where there are fewer. Of
    equally similar ones the first row is nearer.
    """
    if k < 1:
        raise DataError(f"{k} neighbours; ask for at least 1")
    tiles.check(vectors, exclude)
    vectors, _ = tiles.shared_columns(vectors, vectors)
    ids = np.ascontiguousarray(exclude, np.int64)
    index = np.full((len(ids), k), NONE, np.int64)
    similarity = np.full((len(ids), k), -np.inf, np.float32)
    across, down = tiles.grid(vectors, vectors)

    def work(thread: int, buffer: NDArray[np.float32]) -> None:
        for i in across[thread :: tiles.threads()]:
            for j in down:
                tile = tiles.similarities(vectors[i], vectors[j], buffer)
                _keep_best(tile, ids[i], ids[j], j.start, index[i], similarity[i])

    tiles.each_thread(work)
    return index, similarity


def vote(neighbours: NDArray[np.int64], labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """The label most of the neighbours have; of equally frequent ones that of the nearest.

    `neighbours` (N, k) are rows of `labels` (M,), nearest first, as `top_k` returns them. int64 (N,);
    NONE without any neighbour.
    """
    found = np.where(neighbours >= 0, np.asarray(labels, np.int64)[neighbours], NONE)
    votes = (found[:, :, None] == found[:, None, :]).sum(axis=2)
    votes[found == NONE] = 0
    winner = votes.argmax(axis=1)  # the first maximum, so the nearest
    return np.asarray(found[np.arange(len(found)), winner])


def macro_f1(
    truth: NDArray[np.integer], predicted: NDArray[np.integer], weights: NDArray[np.float64] | None = None
) -> float:
    """Mean over the labels that occur in `truth` of their F1; NaN if there are none. `weights` are of
    rows."""
    w = np.ones(len(truth)) if weights is None else weights
    size = int(max(truth.max(initial=-1), predicted.max(initial=-1))) + 1
    right, told = truth == predicted, predicted >= 0
    hit = np.bincount(truth[right], w[right], size)
    actual = np.bincount(truth, w, size)
    claimed = np.bincount(predicted[told], w[told], size)
    present = actual > 0
    return float((2 * hit[present] / (actual + claimed)[present]).mean()) if present.any() else np.nan


@nb.njit(nogil=True, cache=True)
def _keep_best(tile, ids_a, ids_b, first, index, similarity):  # type: ignore[no-untyped-def]
    """Brings the best k of each row up to date with a tile whose first column is number `first`."""
    k = index.shape[1]
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            s = tile[i, j]
            if s <= similarity[i, k - 1] or ids_a[i] == ids_b[j]:
                continue
            at = k - 1
            while at > 0 and similarity[i, at - 1] < s:
                index[i, at], similarity[i, at] = index[i, at - 1], similarity[i, at - 1]
                at -= 1
            index[i, at], similarity[i, at] = first + j, s
