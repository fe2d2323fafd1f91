"""Do calibrated similarities keep their word on sources they were not fitted on?

The curve that sets the threshold turns a similarity into the chance that both sequences are of one source.
It is fitted on validation sources; here pairs of other parts are put in bins by that chance, and in each bin
the share that truly is of one source stands beside it (a reliability curve). Pairs are drawn and weighted as
for the fit, so that only the sources differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscan.clustering.calibration import Calibration, KnownPairs, cosines, known_pairs, reliability
from rayscan.evaluation.intervals import Resamples, figure

_PAIRS = 50_000


def kept_word(
    vectors: NDArray[np.float32],
    source: NDArray[np.int64],
    curve: Calibration,
    weights: Resamples,
    seed: int = 0,
) -> dict[str, Any]:
    """{"bins", "error", "prior", "pairs_same", "pairs_different"} as the layout of an evaluation has them.

    `source` (N,) are positions 0 to G-1 and `weights` of G. Raises DataError where there are no
    pairs of one kind.
    """
    known = known_pairs(source, prior=curve.prior, seed=seed, max_pairs=_PAIRS)
    chance = curve.chance(cosines(vectors, known.rows))
    bins, error = reliability(chance, known.same, known.weight)
    drawn = (_drawn(known, source, w) for w in weights)
    draws = [reliability(chance, known.same, each)[1] if each.any() else np.nan for each in drawn]
    several = len(np.unique(source[known.rows[known.same, 0]]))
    return {
        "bins": bins,
        "error": figure(error, np.array(draws), several),
        "prior": curve.prior,
        "pairs_same": int(known.same.sum()),
        "pairs_different": int((~known.same).sum()),
    }


def _drawn(known: KnownPairs, source: NDArray[np.int64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights of pairs when sources are drawn so often; both kinds keep their share."""
    first, second = w[source[known.rows]].T
    weight: NDArray[np.float64] = known.weight * np.where(known.same, first, first * second)
    for kind in (known.same, ~known.same):
        weight[kind] *= known.weight[kind].sum() / max(weight[kind].sum(), 1e-300)
    return weight
