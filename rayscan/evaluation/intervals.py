"""How far figures would move with other sources: bootstrap over sources, not over sequences or pairs.

Sequences of one source are alike, and a pair has two ends, so resampling either would promise far too
much. A resample is a weight for each source: how often it was drawn. Every figure is written as a
function of sums per source, so that a resample costs a weighted sum and no similarity is computed
again. All methods see the same resamples, so their intervals compare.

Two kinds of figures are no such sums. An AUROC by label moves with the pairs of either side: so each pair
is ranked among those of the other side, and the sums of both are redrawn, which is right to first order. And
a vote depends on which sources there are: so each is left out in turn, and what that changes is redrawn
(`evaluation.jackknife`).

What is traded: in figures by source, the distribution of different-source similarities and the nearest stay
those of the whole sample, which move less than a source's own few pairs. docs/evaluation.md says how often
intervals hold what they should.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayscan.evaluation.pairs import PairCounts, average_precision, centres, from_above
from rayscan.evaluation.tiles import Vectors, squared_lengths

PERCENTILES = (2.5, 97.5)
F64 = NDArray[np.float64]
Draws = dict[str, F64]
"""For each figure its value in every resample, float64 (resamples,); NaN where it is undefined."""


@dataclass(frozen=True)
class Resamples:
    """How often each source is drawn when as many are drawn as there are: `times` float64 (n_sources,).

    They are drawn whenever they are walked, and come out the same: 200 of them for a million sources would
    fill gigabytes.
    """

    n_sources: int
    times: int
    seed: int

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[F64]:
        rng = np.random.default_rng(self.seed)
        for _ in range(self.times):
            drawn = rng.integers(0, self.n_sources, self.n_sources)
            yield np.bincount(drawn, minlength=self.n_sources).astype(np.float64)


def figure(value: float, draws: F64 | None, n: int) -> dict[str, Any]:
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


def separation_draws(
    vectors: Vectors,
    source: NDArray[np.int64],
    counts: PairCounts,
    own: sparse.csr_array,
    weights: Resamples,
) -> Draws:
    """AUROC, average precision and mean of same-source pairs; mean of different-source pairs.

    `source` (N,) are positions 0 to G-1, `counts` those of all pairs, and `own` (G, bins) those of each
    source (`blockwise.own_counts`).
    """
    filled = np.unique(own.indices)
    tables = counts.ranks(), centres(counts.same.size), from_above(counts.different)
    ranks, middle, above = (table[filled] for table in tables)
    by_bin = own[:, filled].T.tocsr()
    draws = np.full((3, len(weights)), np.nan)
    for number, w in enumerate(weights):
        same = np.asarray(by_bin @ w)
        if total := same.sum():
            draws[:, number] = same @ ranks / total, average_precision(same, above), same @ middle / total
    names = ("auroc", "average_precision", "mean_same")
    return dict(zip(names, draws, strict=True)) | {
        "mean_different": _mean_different(vectors, source, weights)
    }


def _mean_different(vectors: Vectors, source: NDArray[np.int64], weights: Resamples) -> F64:
    """Exact: the products of sources' vector sums, less those of a source with its own copies."""
    n = weights.n_sources
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


def retrieval_draws(hits: F64, source: NDArray[np.int64], weights: Resamples) -> Draws:
    """R@1, micro and macro. `hits` (N,): how surely the nearest is of the same source."""
    size = np.bincount(source, minlength=weights.n_sources)
    several = size > 1
    of_source = np.where(several, np.bincount(source, hits, weights.n_sources), 0)
    size = np.where(several, size, 0)
    means = of_source / np.maximum(size, 1)
    return {
        "r_at_1": _ratio(weights, of_source, size),
        "r_at_1_macro": _ratio(weights, means, several.astype(np.float64)),
    }


def macro_mean(own: sparse.csr_array, weights: Resamples) -> tuple[float, F64]:
    """Mean over sources of the mean of their own pairs, by bin in `own` (G, bins), and its draws; NaN without
    any."""
    size = own.sum(axis=1)
    means = own @ centres(own.shape[1]) / np.maximum(size, 1)
    several = (size > 0).astype(np.float64)
    value = float(means.sum() / several.sum()) if several.any() else np.nan
    return value, _ratio(weights, means, several)


def pair_changes(
    values: F64, counts: NDArray[np.int64], source: NDArray[np.int64], weights: Resamples
) -> F64:
    """What each resample adds to a mean over pairs of different sources, from sums (N,) and numbers (N,) of
    the pairs of each vector.

    Both ends of a pair are resampled, and to first order their changes add up. Weighting each vector's own
    pairs moves one end only, by half as much: so the changes are doubled.
    """
    n = weights.n_sources
    one_end = _ratio(weights, np.bincount(source, values, n), np.bincount(source, counts, n))
    return np.asarray(2 * (one_end - values.sum() / max(counts.sum(), 1)))


def left_out_draws(value: float, without: F64, weights: Resamples) -> F64:
    """A figure between 0 and 1, from what it is without each source (G,): the jackknife's changes, redrawn.

    To first order a source that is drawn twice changes as much as leaving it out does, the other way. In the
    mean this overstates the variance, never understates it (Efron and Stein, The jackknife estimate of
    variance, Annals of Statistics, 1981).
    """
    n = weights.n_sources
    changes = np.array([(1 - w) @ without for w in weights], np.float64) * (n - 1) / max(n, 1)
    return np.asarray(np.clip(value + changes, 0, 1))


def _ratio(weights: Resamples, numerator: NDArray[Any], denominator: NDArray[Any]) -> F64:
    sums = np.array([(w @ numerator, w @ denominator) for w in weights], np.float64).reshape(-1, 2)
    undefined = np.full(len(sums), np.nan)
    return np.asarray(np.divide(sums[:, 0], sums[:, 1], out=undefined, where=sums[:, 1] > 0))
