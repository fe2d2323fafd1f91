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

from rayscan.errors import DataError
from rayscan.evaluation import tiles
from rayscan.evaluation.tiles import Vectors

BINS = 2**16 + 1
"""Default number of fine bins; odd, so that 0 is the centre of one."""

_TIE_STEPS = 2**18


@dataclass(frozen=True)
class PairCounts:
    """Pairs counted by similarity. `a + b` counts the pairs of both.

    `same` and `different` are int64 of shape (bins,), over bins centred on `centres(bins)`; the sums are of
    the similarities themselves, so that means do not depend on the bins.
    """

    same: NDArray[np.int64]
    different: NDArray[np.int64]
    sum_same: float
    sum_different: float

    def __add__(self, other: PairCounts) -> PairCounts:
        if self.same.shape != other.same.shape:
            sizes = f"{self.same.size} and {other.same.size} bins"
            raise DataError(f"pair counts of {sizes} do not add up; count both with equal bins")
        return PairCounts(
            self.same + other.same,
            self.different + other.different,
            self.sum_same + other.sum_same,
            self.sum_different + other.sum_different,
        )

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

    def joins(self, threshold: float) -> dict[str, float]:
        """Precision, recall and F1 of joining every pair at least `threshold` similar; NaN where undefined.

        The bin that holds the threshold counts as above it: pairs within 3e-5 of it may go either way.
        """
        first = int(np.clip(_bin(threshold, self.same.size), 0, self.same.size))
        both, joined = int(self.same[first:].sum()), int(self.different[first:].sum())
        joined += both
        return {
            "precision": both / joined if joined else np.nan,
            "recall": both / self.n_same if self.n_same else np.nan,
            "f1": 2 * both / (joined + self.n_same) if joined + self.n_same else np.nan,
        }

    def coarse(self, n: int = 64) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """For plots: edges (n+1,) from -1 to 1, same (n,) and different (n,) counts."""
        edges = np.linspace(-1, 1, n + 1)
        at = np.clip(np.searchsorted(edges, centres(self.same.size), "right") - 1, 0, n - 1)
        same, different = np.zeros((2, n), np.int64)
        np.add.at(same, at, self.same)
        np.add.at(different, at, self.different)
        return edges, same, different


@dataclass(frozen=True)
class Nearest:
    """The nearest other vector of each of N. All of shape (N,); without any other: -1, NaN, 0, NaN."""

    index: NDArray[np.int64]  # the first of the nearest
    similarity: NDArray[np.float32]
    ties: NDArray[np.int64]  # how many are equally near (to 4e-6), at least 1
    same: NDArray[np.float64]  # which share of these is of the same group


def block_statistics(
    a: Vectors,
    groups_a: NDArray[np.integer],
    b: Vectors,
    groups_b: NDArray[np.integer],
    bins: int = BINS,
    *,
    exclude: tuple[NDArray[np.integer], NDArray[np.integer]] | None = None,
) -> PairCounts:
    """Counts of all pairs of one of `a` (I, d) with one of `b` (J, d); the two sets hold different vectors.

    `groups_a` (I,) and `groups_b` (J,) say what each belongs to. `exclude` has a second id for each: pairs
    that agree in it are not counted at all. Raises DataError for rows longer than 1 or not finite.
    """
    tiles.check(a, groups_a, *(() if exclude is None else exclude[:1]))
    tiles.check(b, groups_b, *(() if exclude is None else exclude[1:]))
    total = float(tiles.column_sums(a) @ tiles.column_sums(b))
    a, b = tiles.shared_columns(a, b)
    outer = (None, None) if exclude is None else _codes(*exclude)
    return _statistics((a, b), _codes(groups_a, groups_b), outer, bins, total, symmetric=False)


def pair_statistics(
    vectors: Vectors,
    groups: NDArray[np.integer],
    bins: int = BINS,
    *,
    exclude: NDArray[np.integer] | None = None,
) -> PairCounts:
    """Counts of the N(N-1)/2 unordered pairs of `vectors` (N, d); arguments as in `block_statistics`.

    For vectors in blocks: the sum of this over each block and of `block_statistics` over each two blocks.
    """
    tiles.check(vectors, groups, *(() if exclude is None else (exclude,)))
    sums = tiles.column_sums(vectors)
    total = (float(sums @ sums) - float(tiles.squared_lengths(vectors).sum())) / 2
    sides = tiles.shared_columns(vectors, vectors)
    outer = (None, None) if exclude is None else _codes(exclude, exclude)
    return _statistics(sides, _codes(groups, groups), outer, bins, total, symmetric=True)


def _statistics(
    sides: tuple[Vectors, Vectors],
    ids: tuple[NDArray[np.int32], NDArray[np.int32]],
    exclude: tuple[NDArray[np.int32], NDArray[np.int32]] | tuple[None, None],
    bins: int,
    total: float,
    *,
    symmetric: bool,
) -> PairCounts:
    """`total` is the sum of all similarities: those of different groups are what remains of it."""
    if bins < 3 or bins % 2 == 0:
        raise DataError(
            f"{bins} bins; give an odd number of at least 3, so that a similarity of 0 has its own"
        )
    (a, b), (ids_a, ids_b), (x, y) = sides, ids, exclude
    across, down = tiles.grid(a, b)
    todo = [(i, j) for j in down for i in across if not symmetric or i.start < j.stop]
    counts = np.zeros((tiles.threads(), 2 * bins + 1), np.int64)
    sums = np.zeros((len(todo), 2))  # by tile, so that the number of threads cannot change the rounding

    def work(thread: int, buffer: NDArray[np.float32]) -> None:
        for number in range(thread, len(todo), len(counts)):
            i, j = todo[number]
            tile = tiles.similarities(a[i], b[j], buffer)
            outer = (None, None) if x is None or y is None else (x[i], y[j])
            skip = i.start - j.start + 1 if symmetric else -len(tile)
            _count(tile, ids_a[i], ids_b[j], *outer, skip, counts[thread], sums[number])

    tiles.each_thread(work)
    different, same = counts.sum(axis=0)[:-1].reshape(2, bins)
    sum_same, sum_excluded = sums.sum(axis=0).tolist()
    return PairCounts(same, different, sum_same, total - sum_same - sum_excluded)


def nearest(vectors: Vectors, groups: NDArray[np.integer]) -> Nearest:
    """The nearest other vector of each of `vectors` (N, d), and whether it is of the same group.

    Equal rows are common (all flows to one port), so the nearest is often not one. `Nearest.same` is then the
    chance that one of them drawn at random is of the same group: no order of rows, and no seed, decides.
    """
    tiles.check(vectors, groups)
    vectors, _ = tiles.shared_columns(vectors, vectors)
    ids, _ = _codes(groups, groups)
    n = len(ids)
    index, steps = np.full(n, -1, np.int64), np.full(n, -(2**31), np.int64)
    similarity, counts = np.full(n, np.nan, np.float32), np.zeros((n, 2), np.int64)
    across, down = tiles.grid(vectors, vectors)

    def work(thread: int, buffer: NDArray[np.float32]) -> None:
        for i in across[thread :: tiles.threads()]:
            for j in down:
                tile = tiles.similarities(vectors[i], vectors[j], buffer)
                own = i.start - j.start
                state = (index[i], steps[i], similarity[i], counts[i])
                _nearest(tile, ids[i], ids[j], own, j.start, *state)

    tiles.each_thread(work)
    ties, same = counts[:, 0], counts[:, 1]
    return Nearest(index, similarity, ties, same / np.where(ties > 0, ties, np.nan))


def retrieval(found: Nearest, groups: NDArray[np.integer]) -> tuple[float, float]:
    """R@1, micro and macro: how often the nearest other vector is of the same group.

    Of vectors whose group has another one; micro is their mean, macro the mean of the groups' means. NaN if
    there are none.
    """
    _, group, size = np.unique(groups, return_inverse=True, return_counts=True)
    hits = np.bincount(group, weights=np.nan_to_num(found.same), minlength=size.size)
    several = size > 1
    if not several.any():
        return np.nan, np.nan
    hits, size = hits[several], size[several]
    return float(hits.sum() / size.sum()), float((hits / size).mean())


def same_pairs(
    vectors: Vectors, groups: NDArray[np.integer], bins: int = BINS
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Each same-group pair once: its group (P,) and its bin (P,).

    For groups of bounded size: all P are held in memory. `same_sums` is for the others.
    """
    tiles.check(vectors, groups)
    order = np.argsort(groups, kind="stable")
    vectors, ids = vectors[order], np.asarray(groups, np.int64)[order]
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int32))]
    for i, j in _band(ids):
        tile = tiles.similarities(vectors[i], vectors[j])
        later = np.arange(j.start, j.stop) > np.arange(i.start, i.stop)[:, None]
        x, y = np.nonzero(later & (ids[i, None] == ids[j]))
        found.append((ids[i][x], _bin(tile[x, y], bins)))
    of, at = zip(*found, strict=True)
    return np.concatenate(of), np.concatenate(at)


def same_sums(
    vectors: Vectors,
    groups: NDArray[np.integer],
    table: NDArray[np.float64],
    *,
    exclude: NDArray[np.integer] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each vector, over the others of its group: sum (N,) of `table` at their bins, and number (N,).

    `table` (bins,) gives each bin a value, such as `PairCounts.ranks` or `centres`. `exclude` as above.
    """
    tiles.check(vectors, groups, *(() if exclude is None else (exclude,)))
    order = np.argsort(groups, kind="stable")
    vectors, ids = vectors[order], np.asarray(groups, np.int64)[order]
    x = None if exclude is None else np.asarray(exclude, np.int64)[order]
    sums, counts = np.zeros(len(order)), np.zeros(len(order), np.int64)
    for i, j in _band(ids):
        tile = tiles.similarities(vectors[i], vectors[j])
        outer = (None, None) if x is None else (x[i], x[j])
        ends = (sums[i], counts[i], sums[j], counts[j])
        _add_same(tile, ids[i], ids[j], *outer, i.start - j.start + 1, table, *ends)
    back = np.argsort(order)
    return sums[back], counts[back]


def _band(ids: NDArray[np.int64]) -> Iterator[tuple[slice, slice]]:
    """Tiles that hold, of ids in ascending order, all pairs (i, j) of equal ids with i < j."""
    ends = np.searchsorted(ids, ids, "right")
    for rows in tiles.slices(len(ids), tiles.SIZE // 4):
        end = int(ends[rows.stop - 1])
        for columns in tiles.slices(end - rows.start, tiles.SIZE):
            yield rows, slice(rows.start + columns.start, rows.start + columns.stop)


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


def _codes(a: NDArray[np.integer], b: NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Both ids as positions in their union: int32 compares twice as fast as int64."""
    codes = np.unique(np.concatenate([a, b]), return_inverse=True)[1].astype(np.int32)
    return codes[: len(a)], codes[len(a) :]


@nb.njit(nogil=True, cache=True)
def _count(tile, ids_a, ids_b, exclude_a, exclude_b, skip, counts, sums):  # type: ignore[no-untyped-def]
    """Counts a tile, of which row i begins at column i + skip.

    counts (2 bins + 1,): bins of different groups, of same groups, and excluded pairs; sums (2,):
    similarities of same groups, and of excluded pairs. Plain loops over one row each are what the
    compiler turns into vector code.
    """
    bins = np.int32(counts.size // 2)
    half, top = np.float32((bins - 1) // 2), np.float32(bins - 1)
    buffer = np.empty(tile.shape[1], np.int32)
    for i in range(tile.shape[0]):
        start = max(i + skip, 0)
        row, at, ids = tile[i, start:], buffer[start:], ids_b[start:]
        for j in range(row.size):
            x = row[j] * half + half + np.float32(0.5)
            k = np.int32(min(max(x, np.float32(0)), top))
            at[j] = k + bins if ids[j] == ids_a[i] else k
        if exclude_a is not None:
            outer = exclude_b[start:]
            for j in range(row.size):
                if outer[j] == exclude_a[i]:
                    at[j] = 2 * bins
        for j in range(row.size):
            counts[np.uint32(at[j])] += 1
        for j in range(row.size):
            if at[j] >= bins:  # rare
                sums[np.int64(at[j] == 2 * bins)] += row[j]


@nb.njit(nogil=True, cache=True)
def _nearest(tile, ids_a, ids_b, own, first, index, steps, similarity, counts):  # type: ignore[no-untyped-def]
    """Brings the nearest so far up to date. Row i itself is column own + i; the tile is overwritten there.

    first: number of the first column; steps (I,): the best similarity in steps of a tie; counts (I, 2): how
    many have it, and how many of these are of the same group.
    """
    at = np.empty(tile.shape[1], np.int32)
    for i in range(tile.shape[0]):
        row = tile[i]
        if 0 <= own + i < row.size:
            row[own + i] = -2
        best = np.int32(-(2**31))
        for j in range(row.size):
            at[j] = np.int32(np.floor(row[j] * np.float32(_TIE_STEPS) + np.float32(0.5)))
            best = max(best, at[j])
        if best < steps[i] or best < -np.int32(1.5 * _TIE_STEPS):
            continue
        for j in range(row.size):
            if at[j] == best:
                if best > steps[i]:
                    steps[i], index[i], counts[i] = best, first + j, 0
                    similarity[i] = min(max(row[j], np.float32(-1)), np.float32(1))
                counts[i, 0] += 1
                counts[i, 1] += ids_a[i] == ids_b[j]


@nb.njit(nogil=True, cache=True)
def _add_same(tile, ids_a, ids_b, exclude_a, exclude_b, skip, table, sums_a, n_a, sums_b, n_b):  # type: ignore[no-untyped-def]
    """Adds the table's value at each same-group pair of a tile to both its ends; skip as in `_count`."""
    half, top = np.float32((table.size - 1) // 2), np.float32(table.size - 1)
    for i in range(tile.shape[0]):
        for j in range(max(i + skip, 0), tile.shape[1]):
            if ids_a[i] != ids_b[j] or (exclude_a is not None and exclude_a[i] == exclude_b[j]):
                continue
            x = tile[i, j] * half + half + np.float32(0.5)
            value = table[np.int32(min(max(x, np.float32(0)), top))]
            sums_a[i] += value
            sums_b[j] += value
            n_a[i] += 1
            n_b[j] += 1
