"""The number of BLAS threads changes no bit of a product, and so no label. Kernels of numba run on one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cc_oracles import points_around_centres
from threadpoolctl import threadpool_info, threadpool_limits

from rayscan.clustering import solve, solve_blocked
from rayscan.clustering.multilevel import _along
from rayscan.clustering.products import inner


@pytest.fixture(autouse=True)
def several_threads() -> None:
    if max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas") < 2:
        pytest.skip("BLAS has one thread")


def same(work: Callable[[], np.ndarray]) -> bool:
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            found.append(work())
    return np.array_equal(*found)


@pytest.mark.parametrize("d", [129, 300, 700])
def test_products_have_the_same_bits(d: int) -> None:
    rng = np.random.default_rng(d)
    a, b = (rng.standard_normal((n, d)).astype(np.float32) for n in (1024, 1500))
    for rows, columns in ((1024, 300), (1024, 1), (1, 1500)):
        assert same(lambda m=rows, k=columns: inner(a[:m], b[:k])), (rows, columns)
    assert np.allclose(inner(a, b), a.astype(np.float64) @ b.T, atol=1e-3)


def test_directions_of_cuts_have_the_same_bits() -> None:
    nodes = np.random.default_rng(0).standard_normal((5003, 300))
    assert same(lambda: _along(nodes, np.random.default_rng(1)))


def test_labels_are_the_same() -> None:
    x = points_around_centres(1200, 21, k=40, d=700, spread=1.0)
    assert same(lambda: solve(x[:300], 0.3))
    assert same(lambda: np.concatenate(solve_blocked(lambda i: x[i::2], 2, 0.3).labels))
