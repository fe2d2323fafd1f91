"""The products of rows with clusters, nearly all of the arithmetic: numpy on the CPU, torch on a GPU.

One choice for all that a thread runs within `products_on`, rather than an argument through every layer: where
products are formed decides how long a search takes, never what a move must gain, which is verified in float64
on the CPU. Scores that agree to float32 rounding may still be proposed in another order, so that a GPU may
end in another local optimum of the same quality. torch is imported where it is asked for; it would double a
worker's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from rayscan.clustering.objective import F32, I64

NEVER = np.float32(-1e30)
P = ParamSpec("P")
T = TypeVar("T")

_CPU_TILE, _TORCH_TILE = (1024, 1024), (16_384, 8192)
_DEVICE: ContextVar[str | None] = ContextVar("products", default=None)

Tops = Callable[[F32, int, int, I64, I64], tuple[F32, I64]]
"""tops(left, start, stop, rows, own): best score of each row of `left` among clusters start to stop, and
which, counted from start; entries (rows, own), also counted from start, are left out."""


@contextmanager
def products_on(device: str | None) -> Iterator[None]:
    """Form products with torch on `device` inside the block; with numpy if None.

    float32 is not cut to TF32 inside, which would break the bounds on scores that are skipped.
    """
    if device is None:
        yield
        return
    import torch

    before, token = torch.get_float32_matmul_precision(), _DEVICE.set(device)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        _DEVICE.reset(token)
        torch.set_float32_matmul_precision(before)


def tile() -> tuple[int, int]:
    """Rows and clusters that are compared at a time."""
    return _CPU_TILE if _DEVICE.get() is None else _TORCH_TILE


def one_thread(work: Callable[P, T]) -> Callable[P, T]:
    """`work` with a BLAS of one thread, so that it gives the same bits on any number of cores.

    OpenBLAS rounds by how many threads share a product, on some processors whatever its size. More cores are
    for tasks, of which each has a thread anyway.
    """

    @wraps(work)
    def limited(*args: P.args, **kwargs: P.kwargs) -> T:
        with threadpool_limits(1, user_api="blas"):
            return work(*args, **kwargs)

    return limited


def products(matrix: F32) -> Tops:
    """Products with the rows of `matrix` float32 (K, d), which moves to the device once."""
    device = _DEVICE.get()
    if device is None:
        return partial(_numpy_tops, matrix, np.empty(_CPU_TILE[0] * _CPU_TILE[1], np.float32))
    import torch

    return partial(_torch_tops, torch.tensor(matrix, device=device))


def _numpy_tops(
    matrix: F32, buffer: F32, left: F32, start: int, stop: int, rows: I64, own: I64
) -> tuple[F32, I64]:
    scores = buffer[: len(left) * (stop - start)].reshape(len(left), stop - start)
    np.matmul(left, matrix[start:stop].T, out=scores)
    scores[rows, own] = NEVER
    top = scores.argmax(axis=1)
    return scores[np.arange(len(left)), top], top


def _torch_tops(matrix: Any, left: F32, start: int, stop: int, rows: I64, own: I64) -> tuple[F32, I64]:
    import torch

    place = partial(torch.as_tensor, device=matrix.device)
    scores = place(left) @ matrix[start:stop].T
    scores[place(rows), place(own)] = float(NEVER)
    value, top = scores.max(dim=1)
    return value.cpu().numpy(), top.cpu().numpy()
