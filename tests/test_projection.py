"""Principal components: variance, sign, and what has none."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from rayscan.errors import DataError
from rayscan.evaluation.projection import pca_2d


def test_distances_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((50, 6)) * [5, 3, 1, 1, 0.5, 0.1]).astype(np.float32)
    found, expected = pca_2d(vectors, 3), PCA(2).fit_transform(vectors.astype(np.float64))
    assert found.dtype == np.float32 and found.shape == (50, 2)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)


def test_sign_and_seed() -> None:
    """The longest axis is the second column, which grows: so must the first coordinate."""
    vectors = np.stack([np.zeros(9), np.linspace(-1, 1, 9)], 1).astype(np.float32)
    np.testing.assert_allclose(pca_2d(vectors, 1)[:, 0], vectors[:, 1], atol=1e-6)
    np.testing.assert_array_equal(pca_2d(vectors, 1), pca_2d(vectors, 2))
    np.testing.assert_allclose(pca_2d(vectors[::-1], 1)[::-1], pca_2d(vectors, 1), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (1, 5), (4, 1), (3, 0)])
def test_too_little_for_a_plane(shape: tuple[int, int]) -> None:
    vectors = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    found = pca_2d(vectors, 0)
    assert found.shape == (shape[0], 2)
    assert (found[:, 1] == 0).all() and np.isfinite(found).all()


def test_equal_vectors_lie_on_one_point() -> None:
    assert (pca_2d(np.full((5, 3), 0.3, np.float32), 0) == 0).all()


def test_not_finite() -> None:
    with pytest.raises(DataError, match="finite"):
        pca_2d(np.array([[np.nan, 0]], np.float32), 0)
