"""The number of BLAS threads changes no label. Kernels of numba run on one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cc_oracles import points_around_centres
from threadpoolctl import threadpool_info, threadpool_limits

from rayscan.clustering import solve, solve_blocked


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


def test_labels_are_the_same() -> None:
    x = points_around_centres(1200, 21, k=40, d=700, spread=1.0)
    assert same(lambda: solve(x[:300], 0.3))
    assert same(lambda: np.concatenate(solve_blocked(lambda i: x[i::2], 2, 0.3).labels))
