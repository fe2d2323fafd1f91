"""Which side a source falls on, and which of its sequences are kept back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayscan.config import SplitConfig
from rayscan.evaluation.splits import TRAIN, UNSEEN_SEQUENCES, UNSEEN_SOURCES, VALIDATION, part_of


def every_sequence(n_sources: int, each: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    src = np.repeat(np.arange(n_sources) * 7919 + 16_777_216, each)
    return src, np.tile(np.arange(each), n_sources), np.full(len(src), each)


def test_shares_of_sources() -> None:
    src, index, sequences = every_sequence(20_000, 1)
    share = np.bincount(part_of(src, index, sequences, SplitConfig()), minlength=4) / len(src)
    assert share[UNSEEN_SOURCES] == pytest.approx(0.2, abs=0.01)
    assert share[VALIDATION] == pytest.approx(0.1, abs=0.01)
    assert share[UNSEEN_SEQUENCES] == 0  # the only sequence of a source is for training


def test_a_source_lies_on_one_side_whatever_else_there_is() -> None:
    src, index, sequences = every_sequence(500, 10)
    part = part_of(src, index, sequences, SplitConfig())
    held = np.isin(part, (VALIDATION, UNSEEN_SOURCES)).reshape(500, 10)
    assert (held.all(1) | ~held.any(1)).all()
    rows = np.random.default_rng(0).permutation(len(src))[:77]
    np.testing.assert_array_equal(part[rows], part_of(src[rows], index[rows], sequences[rows], SplitConfig()))


def test_the_last_sequences_are_kept_back() -> None:
    src, index, sequences = every_sequence(200, 10)
    part = part_of(src, index, sequences, SplitConfig()).reshape(200, 10)
    trained = part[part[:, 0] == TRAIN]
    assert len(trained) > 100
    assert (trained == [TRAIN] * 8 + [UNSEEN_SEQUENCES] * 2).all()


@given(st.integers(1, 400), st.integers(0, 99))
def test_as_many_as_the_share_says(n: int, percent: int) -> None:
    """In exact arithmetic: at least that share is kept back, and one is always trained on."""
    split = SplitConfig(test_sources=0, validation_sources=0, unseen_sequences=percent / 100)
    part = part_of(np.zeros(n, np.int64), np.arange(n), np.full(n, n), split)
    assert (part == TRAIN).sum() == max(n * (100 - percent) // 100, 1)


def test_seed_and_nothing_kept() -> None:
    src, index, sequences = every_sequence(1000, 2)
    once = part_of(src, index, sequences, SplitConfig(seed=0))
    again = part_of(src, index, sequences, SplitConfig(seed=1))
    assert 0.2 < (once != again).mean() < 0.8
    none = SplitConfig(test_sources=0, validation_sources=0, unseen_sequences=0)
    assert (part_of(src, index, sequences, none) == TRAIN).all()
    assert part_of(src[:0], index[:0], sequences[:0], none).dtype == np.int8


def test_networks_stay_together() -> None:
    src = np.repeat(np.arange(400) << 8, 30) + np.tile(np.arange(30), 400)
    once = np.zeros(len(src), np.int64), np.ones(len(src), np.int64)
    part = part_of(src, *once, SplitConfig(group="network")).reshape(400, 30)
    assert (part == part[:, :1]).all()
    assert (part[:, 0] == UNSEEN_SOURCES).mean() == pytest.approx(0.2, abs=0.06)
    single = part_of(src, *once, SplitConfig()).reshape(400, 30)
    assert (single != single[:, :1]).any()
