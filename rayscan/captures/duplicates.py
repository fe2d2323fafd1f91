"""Which rows of a capture repeat an earlier one, at 8 bytes a distinct row, of the last 16 to 32 million.

Rows are told apart by a 64-bit hash of all their values, so the answer is exact but for collisions: among n
distinct rows one is expected to be mistaken for another n² / 2^65 times, 0.0003 for a capture of 100 million.
The hashes are kept as a few sorted arrays whose sizes fall by half or more; a new batch is looked up in each
by bisection and merged with those of its own size. That costs O(log n) per row, and no hash table of Python
objects.

Repeated rows have the same time, so in a capture that is anywhere near in time order they are near each
other. Rows further back than `MOST` distinct ones may be forgotten: 256 MB are enough for a capture of any
size, and what is missed is a repetition from another part of a capture that someone has put together.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

MOST = 1 << 24


class Seen:
    """The latest rows of one capture: `most` distinct ones at least, twice as many at most."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._runs: list[NDArray[np.uint64]] = []  # sorted, each at least twice as long as the next
        self._older: list[NDArray[np.uint64]] = []

    def repeats(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Whether each row equals an earlier one, of this table or of those before it. Null equals null."""
        hashes = row_hashes(rows)
        order = np.argsort(hashes)  # a stable sort takes four times as long
        ordered = hashes[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))[: len(hashes)]
        distinct = ordered[starts]
        known = np.zeros(len(distinct), np.bool_)
        for run in (*self._runs, *self._older):
            place = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            known |= run[place] == distinct
        self._add(distinct[~known])
        repeated = np.ones(len(hashes), np.bool_)
        repeated[np.minimum.reduceat(order, starts)] = known  # the first of equals
        return repeated

    def _add(self, run: NDArray[np.uint64]) -> None:
        if sum(map(len, self._runs)) >= self._most:
            self._older, self._runs = self._runs, []
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")  # merges two runs in order
        if len(run):
            self._runs.append(run)


def row_hashes(rows: pa.Table) -> NDArray[np.uint64]:
    """64-bit hash of each row over all columns, shape (N,). Stable within one version of polars only."""
    frame = pl.from_arrow(rows)
    assert isinstance(frame, pl.DataFrame)
    return frame.hash_rows(seed=0).to_numpy()
