"""k nearest neighbours: do sequences of a label lie next to others of it that come from elsewhere?

Neighbours of the same source are masked, since a source is easily recognised and says nothing about who
runs it. The search is exact, block by block, and memory is N×k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayscan.errors import DataError
from rayscan.evaluation.blockwise import NONE as NONE
from rayscan.evaluation.blockwise import compare
from rayscan.evaluation.tiles import Vectors

KS = (1, 3, 5, 7)


def top_k(
    vectors: Vectors, k: int, exclude: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest of each of `vectors` (N, d) among those of another `exclude` id, as in `Neighbours`."""
    if k < 1:
        raise DataError(f"{k} neighbours; ask for at least 1")
    found = compare(vectors, exclude, exclude=exclude, k=k).neighbours
    assert found is not None
    return found.index, found.similarity


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
