"""Nearest neighbours against a full sort, votes against hand-made ballots."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import f1_score

from rayscan.errors import DataError
from rayscan.evaluation import tiles
from rayscan.evaluation.neighbours import NONE, macro_f1, top_k, vote
from rayscan.methods.floors import random_unit


@pytest.mark.parametrize("size", [16, 1024])
@pytest.mark.parametrize("sparse_rows", [False, True])
def test_neighbours_are_those_of_a_full_sort(
    monkeypatch: pytest.MonkeyPatch, size: int, sparse_rows: bool
) -> None:
    monkeypatch.setattr(tiles, "SIZE", size)
    vectors, src = random_unit(100, 6, 0), np.random.default_rng(0).integers(0, 25, 100)
    full = vectors @ vectors.T
    full[src[:, None] == src] = -np.inf
    index, similarity = top_k(sparse.csr_array(vectors) if sparse_rows else vectors, 7, src)
    np.testing.assert_array_equal(index, np.argsort(-full, axis=1)[:, :7])
    np.testing.assert_allclose(similarity, -np.sort(-full, axis=1)[:, :7], atol=1e-6)


def test_equal_neighbours_come_in_the_order_of_rows() -> None:
    vectors = np.tile(np.float32([[1, 0]]), (5, 1))
    assert top_k(vectors, 2, np.arange(5))[0].tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_fewer_neighbours_than_asked_for() -> None:
    index, similarity = top_k(np.eye(3, dtype=np.float32), 3, np.array([4, 4, 8]))
    assert index.tolist() == [[2, NONE, NONE], [2, NONE, NONE], [0, 1, NONE]]
    assert similarity[0].tolist() == [0, -np.inf, -np.inf]
    assert vote(index, np.array([5, 6, 7])).tolist() == [7, 7, 5]


def test_one_source_has_no_neighbours() -> None:
    index, _ = top_k(np.eye(3, dtype=np.float32), 2, np.zeros(3, np.int64))
    assert (index == NONE).all()
    assert vote(index, np.array([1, 1, 1])).tolist() == [NONE] * 3
    assert macro_f1(np.array([1, 1, 1]), np.full(3, NONE)) == 0


def test_the_nearest_decides_a_tied_vote() -> None:
    labels = np.array([10, 11, 11, 12, 10])
    ballots = np.array([[0, 1, 2, 3, 4], [1, 0, 2, 4, 3], [3, 1, 2, 0, 4], [3, 0, 1, NONE, NONE]])
    assert vote(ballots, labels).tolist() == [10, 11, 11, 12]
    assert vote(ballots[:, :1], labels).tolist() == [10, 11, 12, 12]


def test_macro_f1_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    assert macro_f1(truth, predicted) == pytest.approx(f1_score(truth, predicted, average="macro"))
    times = rng.integers(0, 4, 200)
    repeated = f1_score(np.repeat(truth, times), np.repeat(predicted, times), average="macro")
    assert macro_f1(truth, predicted, times.astype(np.float64)) == pytest.approx(repeated)


def test_a_label_that_is_never_the_truth_does_not_count() -> None:
    assert macro_f1(np.array([0, 0]), np.array([0, 1])) == pytest.approx(2 / 3)
    assert np.isnan(macro_f1(np.zeros(0, np.int64), np.zeros(0, np.int64)))


def test_at_least_one_neighbour() -> None:
    with pytest.raises(DataError, match="at least 1"):
        top_k(np.eye(2, dtype=np.float32), 0, np.arange(2))
