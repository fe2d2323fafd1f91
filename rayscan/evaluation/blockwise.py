"""All pairs of N vectors, block by block: counted by similarity, and who is nearest to whom.

Each unordered pair is compared once, in one tile, and told to everything that asks: the counts, and both its
ends. A block of tiles is an item of a parallel map that returns integers and a few neighbours, never
similarities. Blocks are cut along one grid of tiles, counts and ties are integers, and equally near
neighbours are ordered by their row: so the results are the same to the last bit whatever the size of blocks
and the number of workers.

Traded: what is nearest is kept per block and merged, which costs a walk over 2k neighbours per row and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayscan.errors import DataError
from rayscan.evaluation import tiles
from rayscan.evaluation.pairs import BINS, PairCounts, same_pairs
from rayscan.evaluation.tiles import Map, Vectors

NONE = -1

_LARGEST_BLOCK = 2**14  # some seconds of one core, and a few MB of results
_BLOCKS = 12  # along a side, where blocks can be smaller: enough to keep many cores busy
_TIE_STEPS = 2**18
_FEW_PAIRS = 2**14  # of a group: held one by one, since most bins of a histogram would be empty
_UNIT = 2.0**32  # sums of a tile become integers in steps of 1/_UNIT, so that they add up in any order
_BEST = np.dtype([("index", np.int64), ("ties", np.int64), ("same", np.int64), ("similarity", np.float32)])


@dataclass(frozen=True)
class Nearest:
    """The nearest other vector of each of N. All of shape (N,); without any other: -1, NaN, 0, NaN."""

    index: NDArray[np.int64]  # the first of the nearest
    similarity: NDArray[np.float32]
    ties: NDArray[np.int64]  # how many are equally near (to 4e-6), at least 1
    same: NDArray[np.float64]  # which share of these is of the same group


@dataclass(frozen=True)
class Neighbours:
    """The k nearest of each of N, nearest first: rows int64 (N, k) and similarities float32 (N, k).

    NONE and -inf where there are fewer. Of equally similar ones the first row is nearer.
    """

    index: NDArray[np.int64]
    similarity: NDArray[np.float32]


@dataclass(frozen=True)
class Compared:
    """What was asked for."""

    counts: PairCounts
    nearest: Nearest | None
    neighbours: Neighbours | None


@dataclass(frozen=True)
class _Asked:
    """What all blocks need; travels to each machine once."""

    vectors: Vectors
    groups: NDArray[np.int32]
    exclude: NDArray[np.int32] | None
    bins: int
    nearest: bool
    k: int


@dataclass
class _Ends:
    """What is known of the rows of a block, which begin at `first`."""

    first: int
    steps: NDArray[np.int32]
    best: NDArray[Any]
    index: NDArray[np.int64]
    similarity: NDArray[np.float32]

    @classmethod
    def of(cls, rows: slice, asked: _Asked) -> _Ends:
        n = rows.stop - rows.start
        near = n if asked.nearest else 0
        best = np.zeros(near, _BEST)
        best["index"], best["similarity"] = NONE, np.nan
        index = np.full((n, asked.k), NONE, np.int64)
        return cls(
            rows.start,
            np.full(near, -(2**31), np.int32),
            best,
            index,
            np.full(index.shape, -np.inf, np.float32),
        )

    def take(self, other: _Ends) -> None:
        """Bring these rows up to date with what another block has found for some of them."""
        at = slice(other.first - self.first, other.first - self.first + len(other.index))
        if len(self.steps):
            _merge_best(self.steps[at], self.best[at], other.steps, other.best)
        if self.index.shape[1]:
            found = other.index.copy(), other.similarity.copy()  # copies: what travels is read-only
            _merge_kept(self.index[at], self.similarity[at], *found)


def compare(
    vectors: Vectors,
    groups: NDArray[np.integer],
    *,
    exclude: NDArray[np.integer] | None = None,
    bins: int = BINS,
    nearest: bool = False,
    k: int = 0,
    map: Map = tiles.in_threads,
    block: int | None = None,
) -> Compared:
    """Counts of all N(N-1)/2 unordered pairs of `vectors` (N, d); with `nearest` or `k`, also who is nearest.

    `groups` (N,) says what each belongs to. `exclude` (N,) has a second id for each: pairs that agree in it
    are neither counted nor among the k nearest; `nearest` does not heed it. Blocks have `block` rows, rounded
    up to whole tiles. Raises DataError for rows longer than 1 or not finite.
    """
    tiles.check(vectors, groups, *(() if exclude is None else (exclude,)))
    if bins < 3 or bins % 2 == 0:
        raise DataError(
            f"{bins} bins; give an odd number of at least 3, so that a similarity of 0 has its own"
        )
    sums = tiles.column_sums(vectors)
    total = (float(sums @ sums) - float(tiles.squared_lengths(vectors).sum())) / 2
    asked = _Asked(
        tiles.shared_columns(vectors, vectors)[0],
        _codes(groups),
        None if exclude is None else _codes(exclude),
        bins,
        nearest,
        k,
    )
    n = len(asked.groups)
    size = tiles.SIZE * -(-(block or min(max(n // _BLOCKS, 1), _LARGEST_BLOCK)) // tiles.SIZE)
    cut = list(tiles.slices(n, size))
    items = [(rows, columns) for i, rows in enumerate(cut) for columns in cut[i:]]
    counts, sum_same, sum_excluded = np.zeros(2 * bins + 1, np.int64), 0, 0
    ends = _Ends.of(slice(0, n), asked)
    for counted, same, excluded, found in map(_compare_block, items, asked):
        counts += counted
        sum_same, sum_excluded = sum_same + same, sum_excluded + excluded
        for each in found:
            ends.take(each)
    different, same_counts = counts[:-1].reshape(2, bins)
    joined, left_out = sum_same / _UNIT, sum_excluded / _UNIT
    return Compared(
        PairCounts(same_counts, different, joined, total - joined - left_out),
        _nearest_of(ends.best) if nearest else None,
        Neighbours(ends.index, ends.similarity) if k else None,
    )


def pair_statistics(
    vectors: Vectors,
    groups: NDArray[np.integer],
    bins: int = BINS,
    *,
    exclude: NDArray[np.integer] | None = None,
    map: Map = tiles.in_threads,
) -> PairCounts:
    """The counts of `compare` alone."""
    return compare(vectors, groups, bins=bins, exclude=exclude, map=map).counts


def own_counts(vectors: Vectors, groups: NDArray[np.int64], map: Map = tiles.in_threads) -> sparse.csr_array:
    """`PairCounts.same` of each group apart, float64 (G, BINS); `groups` (N,) are positions 0 to G-1.

    A group fills at most as many bins as it has pairs, and as there are: so memory grows with N, by 2 KB
    a vector at the very most, whether one group has all of them or each has a few.
    """
    sizes = np.bincount(groups)
    many = np.flatnonzero(sizes * (sizes - 1) // 2 > _FEW_PAIRS)
    few = np.flatnonzero(~np.isin(groups, many))
    group, bin = same_pairs(vectors[few], groups[few])
    groups_of, bins, counts = [group.astype(np.int32)], [bin], [np.ones(len(bin))]
    for one in many:
        rows = np.flatnonzero(groups == one)
        same = pair_statistics(vectors[rows], np.zeros(len(rows), np.int64), map=map).same
        bins.append(np.flatnonzero(same).astype(np.int32))
        counts.append(same[bins[-1]].astype(np.float64))
        groups_of.append(np.full(len(bins[-1]), one, np.int32))
    cells = np.concatenate(counts), (np.concatenate(groups_of), np.concatenate(bins))
    return sparse.coo_array(cells, shape=(len(sizes), BINS)).tocsr()


def nearest(vectors: Vectors, groups: NDArray[np.integer]) -> Nearest:
    """The nearest other vector of each of `vectors` (N, d), and whether it is of the same group.

    Equal rows are common (all flows to one port), so the nearest is often not one. `Nearest.same` is then the
    chance that one of them drawn at random is of the same group: no order of rows, and no seed, decides.
    """
    found = compare(vectors, groups, nearest=True).nearest
    assert found is not None
    return found


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


def _compare_block(
    item: tuple[slice, slice], asked: _Asked
) -> tuple[NDArray[np.int64], int, int, list[_Ends]]:
    """Counts, sums of same-group and of excluded pairs, and what the rows and the columns have found."""
    rows, columns = item
    counts = np.zeros(2 * asked.bins + 1, np.int64)
    across, down = _Ends.of(rows, asked), _Ends.of(columns, asked)
    left, right = asked.vectors[rows], asked.vectors[columns]
    ids, other = (np.array(asked.groups[side]) for side in item)  # copies: what travels is read-only
    apart = (None, None) if asked.exclude is None else tuple(np.array(asked.exclude[side]) for side in item)
    last = down.similarity[:, -1].copy() if asked.k else None
    buffer = np.empty(tiles.SIZE**2, np.float32)
    sums = np.zeros(2, np.int64)
    for j in tiles.slices(len(other), tiles.width(right)):
        for i in tiles.slices(len(ids), tiles.SIZE):
            skip = rows.start + i.start - columns.start - j.start + 1 if rows == columns else -tiles.SIZE
            if skip >= j.stop - j.start:
                continue
            tile = tiles.similarities(left[i], right[j], buffer)
            x, y = (None, None) if apart[0] is None else (apart[0][i], apart[1][j])
            of_tile = np.zeros(2)
            _count(tile, ids[i], other[j], x, y, skip, counts, of_tile)
            sums += np.rint(of_tile * _UNIT).astype(np.int64)
            firsts = rows.start + i.start, columns.start + j.start
            if asked.nearest:
                near = across.steps[i], across.best[i], down.steps[j], down.best[j]
                _nearest(tile, ids[i], other[j], skip, *firsts, *near)
            if last is not None:
                kept = across.index[i], across.similarity[i], down.index[j], down.similarity[j]
                _keep_best(tile, x, y, skip, *firsts, *kept, last[j])
    return counts, int(sums[0]), int(sums[1]), [across, down]


def _nearest_of(best: NDArray[Any]) -> Nearest:
    ties = best["ties"]
    share = best["same"] / np.where(ties > 0, ties, np.nan)
    return Nearest(best["index"].copy(), best["similarity"].copy(), ties.copy(), share)


def _merge_best(
    steps: NDArray[np.int32], best: NDArray[Any], new: NDArray[np.int32], found: NDArray[Any]
) -> None:
    """Brings the nearest so far up to date; both hold the same rows."""
    tie = new == steps
    for name in ("ties", "same"):
        best[name][tie] += found[name][tie]
    first = tie & (found["index"] < best["index"])
    for name in ("index", "similarity"):
        best[name][first] = found[name][first]
    better = new > steps
    best[better], steps[better] = found[better], new[better]


def _codes(ids: NDArray[np.integer]) -> NDArray[np.int32]:
    """Positions among the distinct ids: int32 compares twice as fast as int64."""
    return np.asarray(np.unique(ids, return_inverse=True)[1], np.int32)


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
def _nearest(tile, ids_a, ids_b, skip, first_a, first_b, steps_a, best_a, steps_b, best_b):  # type: ignore[no-untyped-def]
    """Brings the nearest so far of both ends up to date; skip as in `_count`.

    first_a, first_b: number of the first row and column; steps: the best similarity in steps of a tie. Most
    rows hold nothing new for any column, and one loop that the compiler turns into vector code sees that.
    """
    buffer = np.empty(tile.shape[1], np.int32)
    for i in range(tile.shape[0]):
        start = max(i + skip, 0)
        row, at, far = tile[i, start:], buffer[start:], steps_b[start:]
        best, news = np.int32(-(2**31)), np.int32(0)
        for j in range(row.size):
            at[j] = np.int32(np.floor(row[j] * np.float32(_TIE_STEPS) + np.float32(0.5)))
            best = max(best, at[j])
            news |= np.int32(at[j] >= far[j])
        if best < steps_a[i] and not news:
            continue
        for j in range(row.size):
            to = start + j
            if at[j] == best and best >= steps_a[i]:
                _take(steps_a, best_a, i, at[j], row[j], first_b + to, ids_a[i] == ids_b[to])
            if at[j] >= far[j]:
                _take(steps_b, best_b, to, at[j], row[j], first_a + i, ids_a[i] == ids_b[to])


@nb.njit(nogil=True, cache=True)
def _take(steps, best, i, step, similarity, other, same):  # type: ignore[no-untyped-def]
    """Row i has another vector at least as near as the nearest so far."""
    one = best[i]
    if step > steps[i]:
        steps[i] = step
        one.ties, one.same = 0, 0
    if one.ties == 0 or other < one.index:
        one.index = other
        one.similarity = min(max(similarity, np.float32(-1)), np.float32(1))
    one.ties += 1
    one.same += same


@nb.njit(nogil=True, cache=True)
def _keep_best(  # type: ignore[no-untyped-def]
    tile, exclude_a, exclude_b, skip, first_a, first_b, index_a, similarity_a, index_b, similarity_b, last
):
    """Brings the best k of both ends up to date; last (J,): the least of the best of each column.

    Tiles of a block come by rising row and column, so of equally similar ones those that are there stay.
    """
    k = index_a.shape[1]
    for i in range(tile.shape[0]):
        start = max(i + skip, 0)
        row, far = tile[i, start:], last[start:]
        best, news = np.float32(-np.inf), np.int32(0)
        for j in range(row.size):
            best = max(best, row[j])
            news |= np.int32(row[j] > far[j])
        if best <= similarity_a[i, k - 1] and not news:
            continue
        for j in range(row.size):
            s, to = row[j], start + j
            if (s <= similarity_a[i, k - 1] and s <= far[j]) or (
                exclude_a is not None and exclude_a[i] == exclude_b[to]
            ):
                continue
            _insert(index_a[i], similarity_a[i], first_b + to, s)
            _insert(index_b[to], similarity_b[to], first_a + i, s)
            far[j] = similarity_b[to, k - 1]


@nb.njit(nogil=True, cache=True)
def _merge_kept(index, similarity, new, found):  # type: ignore[no-untyped-def]
    """Brings the best k of rows up to date, with as many of another block: nearest first, then the first
    row."""
    k = index.shape[1]
    at, near = np.empty(k, np.int64), np.empty(k, np.float32)
    for i in range(index.shape[0]):
        a, b = 0, 0
        for j in range(k):
            s, t = similarity[i, a], found[i, b]
            if s > t or (s == t and index[i, a] < new[i, b]):
                at[j], near[j] = index[i, a], s
                a += 1
            else:
                at[j], near[j] = new[i, b], t
                b += 1
        index[i], similarity[i] = at, near


@nb.njit(nogil=True, cache=True)
def _insert(index, similarity, other, s):  # type: ignore[no-untyped-def]
    """Puts a neighbour among the best k, if it is one: behind those as similar."""
    at = index.size
    while at > 0 and similarity[at - 1] < s:
        if at < index.size:
            index[at], similarity[at] = index[at - 1], similarity[at - 1]
        at -= 1
    if at < index.size:
        index[at], similarity[at] = other, s
