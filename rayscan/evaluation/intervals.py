"""How far figures would move with other sources: bootstrap over sources, not over sequences or pairs.

Sequences of one source are alike, and a pair has two ends, so resampling either would promise far too
much. A resample is a weight for each source: how often it was drawn. Every figure is written as a
function of sums per source, so that a resample costs a weighted sum and no similarity is computed
again.

What is traded: neighbours and the distribution of different-source similarities stay those of the whole
sample; only whose pairs and hits count is redrawn. All methods see the same resamples, so their
intervals compare.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayscan.evaluation.neighbours import macro_f1
from rayscan.evaluation.pairs import PairCounts, average_precision, centres, from_above
from rayscan.evaluation.tiles import Vectors, squared_lengths

PERCENTILES = (2.5, 97.5)
Draws = dict[str, NDArray[np.float64]]
"""For each figure its value in every resample, float64 (resamples,); NaN where it is undefined."""


def figure(value: float, draws: NDArray[np.float64] | None, n: int) -> dict[str, Any]:
    """A value with its 95 % interval over `n` sources, as {"value", "low", "high", "n"}.

    The interval is widened to hold the value where resampling is biased. Undefined things are None.
    """
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None, "n": 0}
    kept = np.zeros(0) if draws is None else draws[np.isfinite(draws)]
    if n < 2 or not len(kept):
        return {"value": float(value), "low": None, "high": None, "n": n}
    low, high = np.percentile(kept, PERCENTILES)
    return {"value": float(value), "low": min(float(low), value), "high": max(float(high), value), "n": n}


def resamples(n_sources: int, times: int, seed: int) -> NDArray[np.float64]:
    """How often each source is drawn when as many are drawn as there are: (times, n_sources)."""
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(0, n_sources, n_sources), minlength=n_sources) for _ in range(times))
    return np.array([*drawn], np.float64).reshape(times, n_sources)


def separation_draws(
    vectors: Vectors,
    source: NDArray[np.int64],
    counts: PairCounts,
    pairs: tuple[NDArray[np.int64], NDArray[np.int32]],
    weights: NDArray[np.float64],
) -> Draws:
    """AUROC, average precision and mean of same-source pairs; mean of different-source pairs.

    `source` (N,) are positions 0 to G-1, `weights` (resamples, G), `counts` those of all pairs, and `pairs`
    the `same_pairs`.
    """
    of, at = pairs
    bins, position = np.unique(at, return_inverse=True)
    ranks, middle = counts.ranks()[bins], centres(counts.same.size)[bins]
    above = from_above(counts.different)[bins]
    draws = np.full((3, len(weights)), np.nan)
    for number, w in enumerate(weights):
        same = np.bincount(position, w[of], len(bins)).astype(np.float64)
        if total := same.sum():
            draws[:, number] = same @ ranks / total, average_precision(same, above), same @ middle / total
    names = ("auroc", "average_precision", "mean_same")
    return dict(zip(names, draws, strict=True)) | {
        "mean_different": _mean_different(vectors, source, weights)
    }


def _mean_different(
    vectors: Vectors, source: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Exact: the products of sources' vector sums, less those of a source with its own copies."""
    n = weights.shape[1]
    member = sparse.csr_array(
        (np.ones(len(source)), (source, np.arange(len(source)))), shape=(n, len(source))
    )
    sums, sizes = member @ vectors.astype(np.float64), np.bincount(source, minlength=n)
    own = squared_lengths(sums)
    draws = np.full(len(weights), np.nan)
    for number, w in enumerate(weights):
        drawn = sums.T @ w
        pairs = (w @ sizes) ** 2 - w**2 @ sizes**2
        if pairs > 0:
            draws[number] = (drawn @ drawn - w**2 @ own) / pairs
    return draws


def retrieval_draws(
    hits: NDArray[np.float64], source: NDArray[np.int64], weights: NDArray[np.float64]
) -> Draws:
    """R@1, micro and macro. `hits` (N,): how surely the nearest is of the same source."""
    size = np.bincount(source, minlength=weights.shape[1])
    several = size > 1
    of_source = np.where(several, np.bincount(source, hits, weights.shape[1]), 0)
    size = np.where(several, size, 0)
    means = of_source / np.maximum(size, 1)
    return {
        "r_at_1": _ratio(weights, of_source, size),
        "r_at_1_macro": _ratio(weights, means, several.astype(np.float64)),
    }


def macro_mean(
    pairs: tuple[NDArray[np.int64], NDArray[np.int32]], bins: int, weights: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Mean over sources of the mean of their own `same_pairs`, and its draws; NaN without any."""
    of, at = pairs
    size = np.bincount(of, minlength=weights.shape[1])
    means = np.bincount(of, centres(bins)[at], len(size)) / np.maximum(size, 1)
    several = (size > 0).astype(np.float64)
    value = float(means.sum() / several.sum()) if several.any() else np.nan
    return value, _ratio(weights, means, several)


def pair_draws(
    values: NDArray[np.float64],
    counts: NDArray[np.int64],
    source: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Mean over pairs of different sources, from sums (N,) and numbers (N,) of the pairs of each vector.

    Both ends of a pair are resampled, and to first order their changes add up. Weighting each vector's own
    pairs moves one end only, by half as much: so the deviations are doubled.
    """
    n = weights.shape[1]
    one_end = _ratio(weights, np.bincount(source, values, n), np.bincount(source, counts, n))
    mean = values.sum() / max(counts.sum(), 1)
    return np.asarray(np.clip(mean + 2 * (one_end - mean), -1, 1))


def vote_draws(
    truth: NDArray[np.int64],
    predicted: NDArray[np.int64],
    source: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Macro-F1 of a vote."""
    return np.array([macro_f1(truth, predicted, w[source]) for w in weights], np.float64)


def _ratio(
    weights: NDArray[np.float64], numerator: NDArray[Any], denominator: NDArray[Any]
) -> NDArray[np.float64]:
    above, below = weights @ numerator, weights @ denominator
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide(above, below, out=undefined, where=below > 0))
