"""The map: neighbours stay together, equal vectors give equal maps, and later ones move nothing."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from rayscan.errors import DataError
from rayscan.evaluation.projection import FEWEST, draw, pca_2d, place


def test_distances_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((50, 6)) * [5, 3, 1, 1, 0.5, 0.1]).astype(np.float32)
    found, expected = pca_2d(vectors), PCA(2).fit_transform(vectors.astype(np.float64))
    assert found.dtype == np.float32 and found.shape == (50, 2)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)


def test_sign_and_order() -> None:
    """The longest axis is the second column, which grows: so must the first coordinate."""
    vectors = np.stack([np.zeros(9), np.linspace(-1, 1, 9)], 1).astype(np.float32)
    np.testing.assert_allclose(pca_2d(vectors)[:, 0], vectors[:, 1], atol=1e-6)
    np.testing.assert_allclose(pca_2d(vectors[::-1])[::-1], pca_2d(vectors), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (1, 5), (4, 1), (3, 0)])
def test_too_little_for_a_plane(shape: tuple[int, int]) -> None:
    vectors = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    found = pca_2d(vectors)
    assert found.shape == (shape[0], 2)
    assert (found[:, 1] == 0).all() and np.isfinite(found).all()


def test_equal_vectors_lie_on_one_point() -> None:
    assert (pca_2d(np.full((5, 3), 0.3, np.float32)) == 0).all()


def test_not_finite() -> None:
    with pytest.raises(DataError, match="finite"):
        pca_2d(np.array([[np.nan, 0]], np.float32))


def planted(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around five directions that are the same for every seed, and which they are of."""
    middles = np.random.default_rng(0).standard_normal((5, 16))
    rng = np.random.default_rng(seed)
    of = rng.integers(0, 5, n)
    vectors = middles[of] + 0.25 * rng.standard_normal((n, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), of


def test_neighbours_stay_together_and_later_ones_join_them() -> None:
    vectors, of = planted(300, 1)
    places = draw(vectors, 3)
    assert places.dtype == np.float32 and places.shape == (300, 2)
    np.testing.assert_array_equal(draw(vectors, 3), places)
    later, group = planted(200, 2)
    found, alike = place(later, vectors, places)
    for points, groups in ((places, of), (found, group)):
        distance = np.linalg.norm(points[:, None] - places, axis=2)
        distance[distance == 0] = np.inf
        assert (of[distance.argmin(axis=1)] == groups).mean() > 0.98
    np.testing.assert_allclose(alike, (later @ vectors.T).max(axis=1), atol=1e-6)
    one = place(later[:1], vectors, places)
    np.testing.assert_array_equal(one[0], found[:1])  # whatever else is placed


@pytest.mark.parametrize("n", [0, 1, 2, FEWEST - 1, FEWEST, 40])
def test_few_or_equal_vectors_have_places(n: int) -> None:
    vectors, _ = planted(n, 5)
    assert np.isfinite(draw(vectors)).all() and draw(vectors).shape == (n, 2)
    assert (draw(np.full((n, 3), 0.5, np.float32)) == 0).all()
    if n:
        assert np.isfinite(place(vectors, vectors, draw(vectors))[0]).all()


def test_many_copies_of_few_vectors_have_places() -> None:
    assert np.isfinite(draw(np.repeat(planted(4, 6)[0], 50, axis=0))).all()
