"""What a sweep tries: settings within their ranges, no two alike, and rungs that halve."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayscan import config as configuration
from rayscan.errors import ConfigError
from rayscan.model.search import draw, keep, rungs


def asked(space: str, *more: str) -> configuration.RunConfig:
    return configuration.load(sets=[f"tune.space={space}", *more], env={})


def test_values_lie_in_their_ranges_and_first_are_the_unchanged_ones():
    space = (
        "{train.learning_rate: {loguniform: [1e-4, 1e-2]}, train.alpha: {uniform: [0.2, 0.4]}, "
        "train.batch_sources: {integer: [64, 66]}, model.inputs: {choice: [[dst_port, gap], [dst_port]]}}"
    )
    config = asked(space, "tune.trials=200")
    trials = draw(config)
    assert [trial.number for trial in trials] == list(range(200))
    assert (trials[0].values, trials[0].config) == ({}, config)
    rates = np.array([trial.config.train.learning_rate for trial in trials[1:]])
    assert rates.min() >= 1e-4
    assert rates.max() <= 1e-2
    assert abs(np.median(np.log10(rates)) + 3) < 0.25  # evenly on the log scale
    assert {t.config.train.batch_sources for t in trials[1:]} == {64, 65, 66}
    assert {t.config.model.inputs for t in trials[1:]} == {("dst_port", "gap"), ("dst_port",)}
    assert all(0.2 <= t.config.train.alpha <= 0.4 for t in trials[1:])
    assert draw(config) == trials
    assert draw(asked(space, "tune.trials=200", "tune.seed=1"))[1:] != trials[1:]


def test_no_two_trials_are_alike_and_invalid_ones_are_not_tried():
    trials = draw(asked("{model.heads: {choice: [1, 2, 3, 4]}}", "tune.trials=50"))  # 3 does not divide 128
    assert sorted(trial.config.model.heads for trial in trials) == [1, 2, 4]  # 4 is what it is without
    with pytest.raises(ConfigError, match=r"nothing to try.*heads 3 does not divide"):
        draw(asked("{model.heads: {choice: [3]}}"))


@given(st.integers(1, 10_000), st.integers(1, 500), st.integers(2, 5))
def test_rungs_grow_by_the_reduction_and_end_at_all_steps(steps, first, reduction):
    ends = rungs(steps, first, reduction)
    assert ends[-1] == steps
    assert all(first <= low and low == high // reduction for low, high in pairwise(ends))
    assert ends[0] // reduction < first


@given(
    st.dictionaries(st.integers(0, 99), st.none() | st.floats(0, 1), min_size=1, max_size=30),
    st.integers(2, 5),
)
def test_the_best_go_on(separations, reduction):
    kept = keep(separations, reduction)
    worked = {n: s for n, s in separations.items() if s is not None}
    assert len(kept) == min(len(worked), math.ceil(len(separations) / reduction))
    out = set(worked) - set(kept)
    assert all(worked[k] >= worked[o] for k in kept for o in out)
