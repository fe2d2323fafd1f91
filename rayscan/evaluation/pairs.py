"""Similarities of all pairs of N vectors: same group (say, source) against different groups.

Nothing of size N² is ever held. Similarities are made tile by tile, as float32 matrix products, and each
tile is at once counted into a histogram fine enough for every figure: AUROC, average precision, precision
and recall at a threshold. Counts are integers, so they add up exactly over blocks, machines and threads.

Bins are centred on multiples of 2/(bins-1), not bounded by them: the values that repeat exactly (-1, 0,
0.5, 1) lie in the middle of a bin, and float noise does not split them. What is traded: pairs within one
bin count as ties, so AUROC carries an error. It is bounded exactly (`PairCounts.auroc_error`) and grows when
all similarities crowd in a corner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from rayscan.evaluation import tiles
from rayscan.evaluation.tiles import Map, Vectors

BINS = 2**16 + 1
"""Default number of fine bins; odd, so that 0 is the centre of one."""

_OTHERS = 2048


@dataclass(frozen=True)
class PairCounts:
    """Pairs counted by similarity.

    `same` and `different` are int64 of shape (bins,), over bins centred on `centres(bins)`; the sums are of
    the similarities themselves, so that means do not depend on the bins.
    """

    same: NDArray[np.int64]
    different: NDArray[np.int64]
    sum_same: float
    sum_different: float

    @property
    def n_same(self) -> int:
        return int(self.same.sum())

    @property
    def n_different(self) -> int:
        return int(self.different.sum())

    @property
    def mean_same(self) -> float:
        """Mean similarity of same-group pairs; NaN if there are none."""
        return _mean(self.sum_same, self.n_same)

    @property
    def mean_different(self) -> float:
        """Mean similarity of different-group pairs; NaN if there are none."""
        return _mean(self.sum_different, self.n_different)

    def ranks(self) -> NDArray[np.float64]:
        """For each bin the share of different-group pairs below it, ties counted half; float64 (bins,)."""
        if not self.n_different:
            return np.full(self.different.size, np.nan)
        return (np.cumsum(self.different) - self.different / 2) / self.n_different

    def ranks_from_above(self) -> NDArray[np.float64]:
        """For each bin the share of same-group pairs above it, ties counted half; float64 (bins,)."""
        if not self.n_same:
            return np.full(self.same.size, np.nan)
        return (from_above(self.same) - self.same / 2) / self.n_same

    def auroc(self) -> float:
        """Chance that a same-group pair is the more similar of two, ties half; NaN if undefined."""
        return float(self.same @ self.ranks() / self.n_same) if self.n_same else np.nan

    def auroc_error(self) -> float:
        """Bound on |auroc() - its value on the unbinned similarities|; NaN if undefined.

        It cannot tell pairs that are truly equal from pairs that share a bin, so many equal pairs widen it.
        """
        if not self.n_same or not self.n_different:
            return np.nan
        return float((self.same / self.n_same) @ (self.different / self.n_different) / 2)

    def average_precision(self) -> float:
        """Precision at each same-group pair, averaged; pairs of a bin share a threshold. NaN if undefined."""
        if not self.n_same or not self.n_different:
            return np.nan
        return average_precision(self.same.astype(np.float64), from_above(self.different))

    def coarse(self, n: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """For plots: edges (n+1,) from -1 to 1, same (n,) and different (n,) counts."""
        edges = np.linspace(-1, 1, n + 1)
        at = np.clip(np.searchsorted(edges, centres(self.same.size), "right") - 1, 0, n - 1)
        same, different = np.zeros((2, n), np.int64)
        np.add.at(same, at, self.same)
        np.add.at(different, at, self.different)
        return edges, same, different


def same_pairs(
    vectors: Vectors, groups: NDArray[np.integer], bins: int = BINS
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Each same-group pair once: its group (P,) and its bin (P,).

    For groups of bounded size: all P are held in memory. `blockwise.own_counts` is for any.
    """
    tiles.check(vectors, groups)
    order = np.argsort(groups, kind="stable")
    vectors, ids = vectors[order], np.asarray(groups, np.int64)[order]
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int32))]
    for i, j in _band(ids, slice(0, len(ids))):
        tile = tiles.similarities(vectors[i], vectors[j])
        later = np.arange(j.start, j.stop) > np.arange(i.start, i.stop)[:, None]
        x, y = np.nonzero(later & (ids[i, None] == ids[j]))
        found.append((ids[i][x], _bin(tile[x, y], bins)))
    of, at = zip(*found, strict=True)
    return np.concatenate(of), np.concatenate(at)


def same_sums(
    vectors: Vectors,
    groups: NDArray[np.integer],
    tables: NDArray[np.float64],
    *,
    exclude: NDArray[np.integer] | None = None,
    map: Map = tiles.in_threads,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each vector, over the others of its group: sums (T, N) of `tables` at their bins, and number (N,).

    `tables` (T, bins) give each bin a value, such as `PairCounts.ranks` or `centres`. Pairs that agree in
    `exclude` (N,) do not count.
    """
    tiles.check(vectors, groups, *(() if exclude is None else (exclude,)))
    order = np.argsort(groups, kind="stable")
    ids = np.asarray(groups, np.int64)[order]
    x = None if exclude is None else np.asarray(exclude, np.int64)[order]
    sums, counts = np.zeros((len(tables), len(order))), np.zeros(len(order), np.int64)
    items = list(tiles.slices(len(order), 4 * tiles.SIZE))
    for first, some, number in map(_add_band, items, (vectors[order], ids, x, tables)):
        at = slice(first, first + len(number))
        sums[:, at] += some
        counts[at] += number
    back = np.argsort(order)
    return sums[:, back], counts[back]


def different_sums(
    vectors: Vectors,
    groups: NDArray[np.integer],
    tables: NDArray[np.float64],
    *,
    exclude: NDArray[np.integer],
    map: Map = tiles.in_threads,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each vector, over others of other groups: sums (T, N) of `tables` (T, bins) at their bins, and
    number (N,).

    Pairs that agree in `exclude` (N,) do not count. The others are `_OTHERS` vectors, evenly over the rows,
    or all if there are no more: that many say how a vector stands to them.
    """
    tiles.check(vectors, groups, exclude)
    n = len(groups)
    others = np.unique(np.linspace(0, n - 1, min(n, _OTHERS)).astype(np.int64))
    ids, apart = np.asarray(groups, np.int64), np.asarray(exclude, np.int64)
    left, right = tiles.shared_columns(vectors, vectors[others])
    sides = (left, ids, apart), (right, ids[others], apart[others])
    items = list(tiles.slices(n, 4 * tiles.SIZE))
    found = list(map(_add_others, items, (*sides, np.ascontiguousarray(tables.T))))
    sums = np.concatenate([sums for sums, _ in found], axis=1) if found else np.zeros((len(tables), 0))
    return sums, np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in found)])


def _add_others(rows: slice, shared: tuple[Any, ...]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums (T, n) and numbers (n,) of these rows."""
    (vectors, ids, exclude), (others, other_ids, other_exclude), tables = shared
    n = rows.stop - rows.start
    sums, counts = np.zeros((n, tables.shape[1])), np.zeros(n, np.int64)
    for j in tiles.slices(len(other_ids), tiles.width(others)):
        right = others[j], other_ids[j].copy(), other_exclude[j].copy()  # copies: what travels is read-only
        for part in tiles.slices(n, tiles.SIZE):
            i = slice(rows.start + part.start, rows.start + part.stop)
            tile = tiles.similarities(vectors[i], right[0])
            sides = ids[i].copy(), right[1], exclude[i].copy(), right[2]
            _add_different(tile, *sides, tables.copy(), sums[part], counts[part])
    return sums.T, counts


def _add_band(rows: slice, shared: tuple[Any, ...]) -> tuple[int, NDArray[np.float64], NDArray[np.int64]]:
    """What pairs of these rows with the same and later rows add to both ends, from the first row on."""
    vectors, ids, exclude, tables = shared
    n = int(np.searchsorted(ids, ids[rows.stop - 1], "right")) - rows.start
    sums, counts = np.zeros((n, len(tables))), np.zeros(n, np.int64)
    tables = np.ascontiguousarray(tables.T)
    for i, j in _band(ids, rows):
        tile = tiles.similarities(vectors[i], vectors[j])
        outer = (None, None) if exclude is None else (exclude[i].copy(), exclude[j].copy())
        a, b = (slice(side.start - rows.start, side.stop - rows.start) for side in (i, j))
        ends = (sums[a], counts[a], sums[b], counts[b])
        _add_same(tile, ids[i].copy(), ids[j].copy(), *outer, i.start - j.start + 1, tables, *ends)
    return rows.start, sums.T, counts


def _band(ids: NDArray[np.int64], rows: slice) -> Iterator[tuple[slice, slice]]:
    """Tiles that hold, of ids in ascending order, all pairs i < j of equal ids with i in `rows`."""
    ends = np.searchsorted(ids, ids[rows], "right")
    for part in tiles.slices(rows.stop - rows.start, tiles.SIZE // 4):
        i = slice(rows.start + part.start, rows.start + part.stop)
        for columns in tiles.slices(int(ends[part.stop - 1]) - i.start, tiles.SIZE):
            yield i, slice(i.start + columns.start, i.start + columns.stop)


def centres(bins: int = BINS) -> NDArray[np.float64]:
    """Similarity at the middle of each bin, float64 (bins,) from -1 to 1."""
    return np.linspace(-1, 1, bins)


def from_above(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each bin the number in it and in all above it, float64."""
    return np.cumsum(counts[::-1])[::-1].astype(np.float64)


def average_precision(same: NDArray[np.float64], different_above: NDArray[np.float64]) -> float:
    """Average precision from same-group counts per bin, and the different-group pairs `from_above` there."""
    filled = same > 0
    above = np.cumsum(same[::-1])[::-1][filled]
    return float(same[filled] @ (above / (above + different_above[filled])) / above[0])


def _mean(total: float, n: int) -> float:
    return float(np.clip(total / n, -1, 1)) if n else np.nan


def _bin(similarity: Any, bins: int) -> Any:
    """Position of the bin a similarity lies in; those beyond [-1, 1] belong to the outermost bins."""
    half = (bins - 1) // 2
    return np.clip(np.floor(similarity * half + half + 0.5), 0, bins - 1).astype(np.int32)


@nb.njit(nogil=True, cache=True)
def _add_same(tile, ids_a, ids_b, exclude_a, exclude_b, skip, tables, sums_a, n_a, sums_b, n_b):  # type: ignore[no-untyped-def]
    """Adds the tables' (bins, T) values at each same-group pair of a tile, of which row i begins at column
    i + skip, to both its ends."""
    half, top = np.float32((tables.shape[0] - 1) // 2), np.float32(tables.shape[0] - 1)
    for i in range(tile.shape[0]):
        for j in range(max(i + skip, 0), tile.shape[1]):
            if ids_a[i] != ids_b[j] or (exclude_a is not None and exclude_a[i] == exclude_b[j]):
                continue
            x = tile[i, j] * half + half + np.float32(0.5)
            at = np.int32(min(max(x, np.float32(0)), top))
            for t in range(tables.shape[1]):
                sums_a[i, t] += tables[at, t]
                sums_b[j, t] += tables[at, t]
            n_a[i] += 1
            n_b[j] += 1


@nb.njit(nogil=True, cache=True)
def _add_different(tile, ids_a, ids_b, exclude_a, exclude_b, tables, sums, n):  # type: ignore[no-untyped-def]
    """Adds the tables' (bins, T) values at each different-group pair of a tile to its row."""
    half, top = np.float32((tables.shape[0] - 1) // 2), np.float32(tables.shape[0] - 1)
    for i in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            if ids_a[i] == ids_b[j] or exclude_a[i] == exclude_b[j]:
                continue
            x = tile[i, j] * half + half + np.float32(0.5)
            at = np.int32(min(max(x, np.float32(0)), top))
            for t in range(tables.shape[1]):
                sums[i, t] += tables[at, t]
            n[i] += 1
