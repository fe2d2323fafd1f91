"""How the similarities of all pairs are walked: tiles of a matrix that is never held whole.

Work is cut into items for a parallel map; here that is threads, in the stages it is Ray tasks. An item
multiplies on one BLAS thread: one product spread over all threads is as fast on an idle machine, but waits
for its slowest part at every tile, and then counts with the product's threads idle. Rows may be dense
float32 or sparse (`scipy.sparse.csr_array`), as port counts are; tiles are always dense.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from threadpoolctl import threadpool_limits

from rayscan.errors import DataError

Vectors = Any
"""float32 array of shape (N, d), or `scipy.sparse.csr_array` of that shape; no row longer than 1."""

Map = Callable[[Callable[[Any, Any], Any], Sequence[Any], Any], Iterable[Any]]
"""map(task, items, shared) yields task(item, shared) for every item, in their order."""

SIZE = 1024
_DENSE_CELLS = 2**22


def check(vectors: Vectors, *ids: NDArray[np.integer]) -> None:
    """Raises DataError unless rows are float32, finite and no longer than 1, and each of `ids` has one
    per row."""
    for each in ids:
        if np.shape(each) != (vectors.shape[0],):
            raise DataError(
                f"{vectors.shape[0]} vectors but ids of shape {np.shape(each)}; give one per vector"
            )
    if vectors.dtype != np.float32:
        raise DataError(f"vectors are {vectors.dtype}; similarities are made of float32, convert them first")
    squares = squared_lengths(vectors)
    if not (squares <= 1.001).all():  # false for NaN too; with it every similarity stays in range
        row = int(np.argmin(squares <= 1.001))
        raise DataError(f"vector {row} has squared length {squares[row]:g}; scale vectors to length 1 first")


def squared_lengths(vectors: Vectors) -> NDArray[np.float64]:
    """Of each row, float64 (N,)."""
    if sparse.issparse(vectors):
        row = np.repeat(np.arange(vectors.shape[0]), np.diff(vectors.indptr))
        squares = np.bincount(row, vectors.data.astype(np.float64) ** 2, vectors.shape[0])
        return squares.astype(np.float64)
    return np.asarray(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))


def column_sums(vectors: Vectors) -> NDArray[np.float64]:
    """Sum of the rows, float64 (d,)."""
    if sparse.issparse(vectors):  # its own `sum` adds in float32, whatever dtype is asked for
        return np.bincount(vectors.indices, vectors.data, vectors.shape[1]).astype(np.float64)
    return np.asarray(vectors.sum(axis=0, dtype=np.float64))


def shared_columns(a: Vectors, b: Vectors) -> tuple[Vectors, Vectors]:
    """Sparse sides without the columns in which no two rows meet: narrower, with the same similarities."""
    if not sparse.issparse(a):
        return a, b
    in_a, in_b = (np.bincount(side.indices, minlength=side.shape[1]) for side in (a, b))
    useful = np.flatnonzero((in_a > 1) if a is b else (in_a > 0) & (in_b > 0))
    left = a[:, useful]
    return left, left if a is b else b[:, useful]


def width(columns: Vectors) -> int:
    """Rows on the right side of a product, a power of two: a tile and its making then stay in the cache."""
    if not sparse.issparse(columns):
        return SIZE
    # The right side of a sparse product is made dense.
    fitting: int = _DENSE_CELLS // max(columns.shape[1], 1)
    return min(max(1 << max(fitting.bit_length() - 1, 0), SIZE // 16), SIZE)


def slices(n: int, size: int) -> Iterator[slice]:
    """0 to n in runs of at most this size."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def similarities(a: Vectors, b: Vectors, buffer: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Inner products of rows of `a` (I, d) and `b` (J, d), float32 (I, J); in `buffer`, if given and
    dense."""
    if sparse.issparse(a):
        return np.ascontiguousarray(a @ np.ascontiguousarray(b.T.toarray()), np.float32)
    if buffer is None:
        return np.asarray(a @ b.T)
    out = buffer[: a.shape[0] * b.shape[0]].reshape(a.shape[0], b.shape[0])
    return np.asarray(np.matmul(a, b.T, out=out))


def threads() -> int:
    """OMP_NUM_THREADS, which Ray sets for its workers, or every CPU."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else os.cpu_count() or 1


def in_threads(task: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterator[Any]:
    """The map on the threads of this process."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads()) as pool:
        yield from pool.map(task, items, repeat(shared))
