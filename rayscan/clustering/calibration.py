"""The threshold without labels: where a pair is as likely of one source as of two.

Two sequences of one source are known to belong together, those of different sources mostly do not. A
logistic curve p(same | cos) = σ(a cos + b) is fitted to such pairs of validation sources, weighted so that
the share of same pairs is the assumed `prior`. Since a cos + b = a (cos − θ) with θ = −b / a, the
calibrated log odds are the weights of correlation clustering up to the factor a, which changes no partition.

Traded: different sources of one campaign count as different, so θ errs to the high side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayscan.errors import DataError

_BINS = 20
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A fitted curve and how well it fits.

    bins   of equal width in predicted probability: mean prediction, observed share, pairs
    error  expected calibration error: mean |predicted − observed| over pairs, weighted to the prior
    """

    threshold: float
    slope: float
    intercept: float
    prior: float
    pairs_same: int
    pairs_different: int
    error: float
    bins: list[dict[str, float]]

    def chance(self, cosine: F64) -> F64:
        """Of each similarity, the fitted chance that the pair is of one source."""
        return _sigmoid(self.slope * cosine + self.intercept)


@dataclass(frozen=True)
class KnownPairs:
    """Pairs of which it is known whether they are of one source, P of them.

    rows    int64 (P, 2), positions of both sequences
    same    bool (P,)
    weight  float64 (P,): those of one source sum to the prior and the others to what remains
    """

    rows: NDArray[np.int64]
    same: NDArray[np.bool_]
    weight: F64


def known_pairs(
    src: NDArray[np.integer], *, prior: float = 0.5, seed: int = 0, max_pairs: int = 200_000
) -> KnownPairs:
    """At most `max_pairs` pairs of one source, and as many of two. `src` (N,).

    Every source weighs the same among the pairs of one source; those of two are drawn evenly over sources.
    Raises DataError where there are no pairs of one kind.
    """
    if not 0 < prior < 1:
        raise DataError(f"prior must lie between 0 and 1, not {prior}")
    rng = np.random.default_rng(seed)
    same, weight = _same_pairs(src, rng, max_pairs)
    different = _different_pairs(src, rng, max_pairs)
    if not (len(same) and len(different)):
        raise DataError(f"no two sequences are of {'one source' if len(different) else 'different sources'}")
    return KnownPairs(
        np.concatenate([same, different]),
        np.arange(len(same) + len(different)) < len(same),
        np.r_[prior * weight, np.full(len(different), (1 - prior) / len(different))],
    )


def calibrate(
    vectors: NDArray[np.float32],
    src: NDArray[np.integer],
    *,
    prior: float = 0.5,
    seed: int = 0,
    max_pairs: int = 200_000,
) -> Calibration:
    """Fit the curve on `known_pairs`. `vectors` float32 (N, d) of length 1, `src` (N,).

    Raises DataError where there are no pairs of one kind, or where similarity does not tell them apart (slope
    0 or below).
    """
    try:
        pairs = known_pairs(src, prior=prior, seed=seed, max_pairs=max_pairs)
    except DataError as missing:
        raise DataError(
            f"cannot calibrate a threshold on validation sources: {missing}; give cluster.threshold a "
            "number, raise split.validation_sources or make sequences shorter"
        ) from None
    cosine = cosines(vectors, pairs.rows)
    slope, intercept = _logistic(cosine, pairs.same.astype(np.float64), pairs.weight)
    if slope <= 0:
        raise DataError(
            "cannot calibrate a threshold: sequences of one source are not more alike than others; "
            "train longer, or give cluster.threshold a number"
        )
    n_same = int(pairs.same.sum())
    bins, error = reliability(_sigmoid(slope * cosine + intercept), pairs.same, pairs.weight)
    return Calibration(
        float(-intercept / slope), slope, intercept, prior, n_same, len(pairs.same) - n_same, error, bins
    )


def _same_pairs(
    src: NDArray[np.integer], rng: np.random.Generator, limit: int
) -> tuple[NDArray[np.int64], F64]:
    """Pairs (P, 2) of one source, next ones in a random order of each, and weights: 1/P' of a source's P'."""
    order = np.lexsort((rng.random(len(src)), src))
    pairs = np.stack([order[:-1], order[1:]], axis=1)
    pairs = pairs[src[pairs[:, 0]] == src[pairs[:, 1]]]
    if len(pairs) > limit:
        pairs = pairs[rng.choice(len(pairs), limit, replace=False)]
    _, group, count = np.unique(src[pairs[:, 0]], return_inverse=True, return_counts=True)
    return pairs, 1 / count[group] / max(len(count), 1)


def _different_pairs(src: NDArray[np.integer], rng: np.random.Generator, limit: int) -> NDArray[np.int64]:
    """Pairs (P, 2) of different sources: both drawn evenly over sources, then over their sequences."""
    order = np.argsort(src, kind="stable")
    _, first, count = np.unique(src[order], return_index=True, return_counts=True)
    drawn = rng.integers(len(first), size=(limit, 2)) if len(first) else np.empty((0, 2), np.int64)
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    return np.asarray(order[first[drawn] + (rng.random(drawn.shape) * count[drawn]).astype(np.int64)])


def cosines(vectors: NDArray[np.float32], pairs: NDArray[np.int64]) -> F64:
    """Of each pair (P, 2) of rows of `vectors`, float64 (P,)."""
    parts = [
        np.einsum("ij,ij->i", vectors[some[:, 0]], vectors[some[:, 1]], dtype=np.float64)
        for some in np.array_split(pairs, len(pairs) // 50_000 + 1)
    ]
    return np.concatenate(parts)


def _sigmoid(x: F64) -> F64:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _logistic(x: F64, y: F64, weights: F64) -> tuple[float, float]:
    """Weighted maximum likelihood of σ(a x + b), by Newton; a little ridge keeps separable data finite."""
    design = np.stack([x, np.ones_like(x)], axis=1)
    ridge = np.diag([1e-6, 0.0])
    beta = np.zeros(2)
    for _ in range(100):
        p = _sigmoid(design @ beta)
        gradient = design.T @ (weights * (y - p)) - ridge @ beta
        curvature = (design * (weights * p * (1 - p))[:, None]).T @ design + ridge + 1e-12 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        step *= min(1.0, 5.0 / max(np.abs(step).max(), 1e-300))
        beta += step
        if np.abs(step).max() < 1e-9:
            break
    return float(beta[0]), float(beta[1])


def reliability(chance: F64, same: NDArray[np.bool_], weight: F64) -> tuple[list[dict[str, float]], float]:
    """`Calibration.bins` and `Calibration.error` of fitted chances (P,) against what is true (P,)."""
    place = np.minimum((chance * _BINS).astype(np.int64), _BINS - 1)
    mass, predicted, observed = (
        np.bincount(place, weights=w, minlength=_BINS) for w in (weight, weight * chance, weight * same)
    )
    pairs = np.bincount(place, minlength=_BINS)
    held = mass > 0
    error = float(np.abs(predicted - observed).sum() / mass.sum())
    rows = zip(predicted[held] / mass[held], observed[held] / mass[held], pairs[held], strict=True)
    return [{"predicted": float(a), "observed": float(b), "pairs": int(n)} for a, b, n in rows], error
