"""Which rows of a capture repeat an earlier one, at 8 bytes a distinct row.

Rows are told apart by a 64-bit hash of all their values, so the answer is exact but for collisions: among n
distinct rows one is expected to be mistaken for another n² / 2^65 times, 0.0003 for a capture of 100 million.
The hashes are kept as a few sorted arrays whose sizes fall by half or more; a new batch is looked up in each
by bisection and merged with those of its own size. That costs O(log n) per row, and no hash table of Python
objects.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray


class Seen:
    """The rows of one capture so far."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []  # sorted, each at least twice as long as the next

    def repeats(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Whether each row equals an earlier one, of this table or of those before it. Null equals null."""
        hashes = row_hashes(rows)
        order = np.argsort(hashes, kind="stable")  # the first of equals stays first
        ordered = hashes[order]
        again = np.zeros(len(hashes), np.bool_)
        again[1:] = ordered[1:] == ordered[:-1]
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, ordered), len(run) - 1)
            again |= run[place] == ordered
        self._add(ordered[~again])
        repeated = np.empty_like(again)
        repeated[order] = again
        return repeated

    def _add(self, run: NDArray[np.uint64]) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")  # merges two runs in order
        if len(run):
            self._runs.append(run)


def row_hashes(rows: pa.Table) -> NDArray[np.uint64]:
    """64-bit hash of each row over all columns, shape (N,). Stable within one version of polars only."""
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    return frame.hash_rows(seed=0).to_numpy()
