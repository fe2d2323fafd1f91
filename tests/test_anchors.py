"""Anchors: that they come to an end, whom they favour, and that they may be drawn in parts."""

from __future__ import annotations

import numpy as np
import pytest

from rayscan.evaluation.anchors import earliest, times


def sequences(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    src = np.repeat(np.arange(len(sizes)) * 7919 + 16_777_216, sizes)
    return np.random.default_rng(0).permutation(len(src)) + 10**12, src


def test_everything_can_be_drawn() -> None:
    """The published code does not end here: all 20 sources are asked for all of their windows."""
    ids, src = sequences([5000] * 20)
    drawn = earliest(times(ids, src), ids, 10**6)
    assert sorted(drawn) == list(range(100_000))


def test_sources_are_drawn_by_the_root_of_what_they_have() -> None:
    """Of 200 sources with 900 sequences and 200 with 100, three anchors to one while all have some left."""
    ids, src = sequences([900] * 200 + [100] * 200)
    drawn = src[earliest(times(ids, src, 1), ids, 4000)]
    heavy = np.isin(drawn, np.unique(src)[:200]).mean()
    assert heavy == pytest.approx(0.75, abs=0.02)


def test_the_first_draws_are_those_of_an_urn() -> None:
    """Chance that each of three sources is drawn first, over many seeds, is that of its root."""
    ids, src = sequences([16, 4, 1])
    first = [src[earliest(times(ids, src, seed), ids, 1)[0]] for seed in range(3000)]
    share = np.unique(first, return_counts=True)[1] / 3000
    np.testing.assert_allclose(share, [4 / 7, 2 / 7, 1 / 7], atol=0.03)


def test_drawn_in_parts_and_in_any_order() -> None:
    ids, src = sequences([3, 40, 7, 1, 25, 25])
    drawn = times(ids, src, 5)
    order = np.random.default_rng(1).permutation(len(ids))
    np.testing.assert_array_equal(times(ids[order], src[order], 5), drawn[order])
    some = src == src[10]
    np.testing.assert_allclose(times(ids[some], src[some], 5), drawn[some], rtol=1e-12)
    assert not np.array_equal(times(ids, src, 6), drawn)


def test_nothing_to_draw() -> None:
    none = np.zeros(0, np.int64)
    assert len(earliest(times(none, none), none, 5)) == 0
    assert earliest(np.array([np.inf, 2.0]), np.arange(2), 5).tolist() == [1]
