"""The objective against pairs, against hand-computed numbers, and its checks."""

from __future__ import annotations

import numpy as np
import pytest
from cc_oracles import pair_weights, points_around_centres, value
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.clustering import canonical, objective
from rayscan.clustering.objective import check_embeddings, cluster_sums
from rayscan.errors import DataError


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 25), st.floats(-1, 1))
def test_equals_the_sum_over_pairs(seed: int, n: int, threshold: float) -> None:
    x = points_around_centres(n, seed)
    labels = np.random.default_rng(seed).integers(-3, 4, n)
    assert objective(x, labels, threshold) == pytest.approx(
        value(pair_weights(x, threshold), labels), abs=1e-9
    )


def test_three_vectors_by_hand() -> None:
    x = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    assert objective(x, [0, 0, 0], 0.5) == pytest.approx(0.1 - 0.5 + 0.3, abs=1e-6)
    assert objective(x, [0, 1, 1], 0.5) == pytest.approx(0.3, abs=1e-6)
    assert objective(x, [0, 1, 2], 0.5) == pytest.approx(0, abs=1e-12)


def test_super_nodes_leave_out_what_lies_inside_them() -> None:
    x = points_around_centres(60, 1)
    nodes = np.random.default_rng(1).integers(12, size=60)
    labels = np.random.default_rng(2).integers(4, size=12)
    sums, sizes = cluster_sums(x, nodes, 12)
    inside = objective(x, nodes, 0.3)
    assert objective(sums, labels, 0.3, sizes) + inside == pytest.approx(
        objective(x, labels[nodes], 0.3), abs=1e-9
    )


def test_a_million_points_in_one_cluster() -> None:
    """n (n - 1) / 2 pairs of cosine 1: the sum needs more digits than float32 has."""
    n = 1_000_000
    x = np.zeros((n, 2), np.float32)
    x[:, 0] = 1
    x[-1] = [0, 1]
    expected = 0.25 * (n - 1) * (n - 2) / 2 - 0.75 * (n - 1)
    assert objective(x, np.zeros(n, np.int64), 0.75) == pytest.approx(expected, rel=1e-12)


def test_canonical_numbers_by_first_member() -> None:
    assert canonical([7, 7, -2, 7, 5, -2]).tolist() == [0, 0, 1, 0, 2, 1]
    assert canonical([]).tolist() == []


def test_objective_of_nothing_and_wrong_shapes() -> None:
    assert objective(np.empty((0, 3), np.float32), [], 0.5) == 0
    with pytest.raises(DataError, match="as many labels"):
        objective(np.eye(3, dtype=np.float32), [0, 1], 0.5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 0], [np.nan, 0]], "row 1 is not finite"),
        ([[np.inf, 0], [1, 0]], "row 0 is not finite"),
        ([[1, 0], [0, 1], [2, 0]], "row 2 has length 2, not 1: normalise it"),
        ([1, 0], "shape"),
    ],
)
def test_bad_embeddings_name_the_row(rows: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_embeddings(np.array(rows, np.float32))


def test_normalise_on_request() -> None:
    assert check_embeddings([[3, 4]], normalise=True) == pytest.approx(np.array([[0.6, 0.8]]))
    with pytest.raises(DataError, match="row 1 has length 0"):
        check_embeddings([[3, 4], [0, 0]], normalise=True)
    with pytest.raises(DataError, match="must be numbers"):
        check_embeddings(np.array([["a"]]))


def test_lengths_that_float32_does_not_hold() -> None:
    tiny = check_embeddings(np.array([[3e-50, 4e-50], [3e50, 4e50]]), normalise=True)
    assert tiny == pytest.approx(np.array([[0.6, 0.8], [0.6, 0.8]]))
    with pytest.raises(DataError, match=r"row 0 has length 1e\+150, not 1"):
        check_embeddings(np.array([[1e150, 0], [1, 0]]))
    with pytest.raises(DataError, match="row 0 is not finite"):
        check_embeddings(np.array([[1e300, 0], [1, 0]]))
