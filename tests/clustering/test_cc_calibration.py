"""Calibration: known curves come back, heavy sources do not rule, and what cannot be calibrated says so."""

from __future__ import annotations

import numpy as np
import pytest

from rayscan.clustering import calibration
from rayscan.clustering.calibration import calibrate
from rayscan.errors import DataError


def sources(n: int, per_source: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((n, 16)), per_source, axis=0)
    x = centres + spread * rng.standard_normal(centres.shape)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), np.repeat(np.arange(n) + 100, per_source)


def test_fit_recovers_a_known_curve() -> None:
    rng = np.random.default_rng(0)
    cosine = rng.uniform(-1, 1, 200_000)
    same = rng.random(len(cosine)) < 1 / (1 + np.exp(-(9 * cosine - 4)))
    slope, intercept = calibration._logistic(
        cosine, same.astype(float), np.full(len(cosine), 1 / len(cosine))
    )
    assert slope == pytest.approx(9, rel=0.02)
    assert -intercept / slope == pytest.approx(4 / 9, abs=0.01)


def test_threshold_lies_between_the_two_kinds_of_pairs() -> None:
    x, src = sources(200, 6, 0.6)
    found = calibrate(x, src)
    assert 0.3 < found.threshold < 0.7
    assert found.slope > 0
    assert found.threshold == pytest.approx(-found.intercept / found.slope)
    assert found.error < 0.05
    assert sum(row["pairs"] for row in found.bins) == found.pairs_same + found.pairs_different


def test_a_rarer_same_source_raises_the_threshold_by_the_log_odds() -> None:
    x, src = sources(200, 6, 1.0)
    even, rare = calibrate(x, src), calibrate(x, src, prior=0.01)
    assert rare.threshold > even.threshold
    # reweighting shifts the intercept by about the log odds of the prior
    assert rare.intercept - even.intercept == pytest.approx(np.log(0.01 / 0.99), rel=0.4)


def test_a_heavy_source_does_not_rule() -> None:
    """Ten thousand sequences of one diffuse source weigh as much as six of another."""
    x, src = sources(150, 6, 0.5)
    heavy = np.random.default_rng(1).standard_normal((3000, 16))
    heavy = (heavy / np.linalg.norm(heavy, axis=1, keepdims=True)).astype(np.float32)
    alone = calibrate(x, src).threshold
    both = calibrate(np.concatenate([x, heavy]), np.concatenate([src, np.zeros(3000, int)])).threshold
    assert both == pytest.approx(alone, abs=0.05)


def test_seeded_and_capped() -> None:
    x, src = sources(50, 20, 0.6)
    a, b = calibrate(x, src, seed=4, max_pairs=100), calibrate(x, src, seed=4, max_pairs=100)
    assert a == b
    assert a.pairs_same <= 100
    assert a.pairs_different <= 100


def test_what_cannot_be_calibrated() -> None:
    x, src = sources(40, 1, 0.5)
    with pytest.raises(DataError, match="no two sequences are of one source"):
        calibrate(x, src)
    with pytest.raises(DataError, match="different sources"):
        calibrate(x, np.zeros(40, int))
    with pytest.raises(DataError):
        calibrate(x[:0], src[:0])
    with pytest.raises(DataError, match="prior"):
        calibrate(x, src, prior=1.0)
    x, src = sources(60, 4, 0.5)
    opposite = x * np.where(np.arange(len(x)) % 2, -1, 1)[:, None]
    with pytest.raises(DataError, match="not more alike"):
        calibrate(opposite.astype(np.float32), np.repeat(np.arange(120), 2))
