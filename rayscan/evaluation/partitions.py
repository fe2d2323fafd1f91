"""Clusters against what is known: how well one partition agrees with another.

All figures come from the contingency table (cluster, group) -> count, held sparse, so a million rows
take a sort and little more. Pairs of sequences are never enumerated: n rows in a cell are n(n-1)/2 pairs.

Sequences of one source share their label, and any clustering that recognises sources joins them, which
flatters the agreement with labels. So joins are also scored over pairs of different sources only: the
pairs of a cell minus those of its (cluster, label, source) cells.

scikit-learn's adjusted mutual information loops over every pair of cluster and group; here those of equal
sizes share one term, and only the likely part of each distribution is summed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import gammaln

from rayscan.errors import DataError

UNLABELLED = -1


@dataclass(frozen=True)
class Joins:
    """Pairs of sequences: all, in one cluster, of one group, and both. Others are cut, or belong apart."""

    pairs: int
    joined: int
    together: int
    both: int

    def scores(self) -> dict[str, Any]:
        """Counts, and for JSON precision, recall and F1 of joins and of cuts; None where undefined.

        `macro_f1` is the mean of both F1, `weighted_f1` weighs each by the pairs that belong so.
        """
        cut, apart = self.pairs - self.joined, self.pairs - self.together
        both_cut = cut - self.together + self.both
        join, cuts = _f1(self.both, self.joined, self.together), _f1(both_cut, cut, apart)
        f1 = np.array([np.nan if one["f1"] is None else one["f1"] for one in (join, cuts)], np.float64)
        support = np.array([self.together, apart], np.float64)
        held = f1[support > 0] @ support[support > 0]
        return {
            **join,
            **asdict(self),
            "cuts": cuts,
            "accuracy": _ratio(self.both + both_cut, self.pairs),
            "macro_f1": _number(float(f1.mean())),
            "weighted_f1": _number(float(held) / self.pairs) if self.pairs else None,
        }


@dataclass(frozen=True)
class Agreement:
    """Scores of one partition against another, as defined by scikit-learn; of no rows, NaN."""

    ari: float
    ami: float
    homogeneity: float
    completeness: float
    v_measure: float


def label_codes(labels: Any) -> tuple[NDArray[np.int64], list[str]]:
    """Position of each label among the names, UNLABELLED for null; int64 (N,), and the names in order.

    `labels` is a pyarrow string array (chunked or not), or a sequence of str and None.
    """
    values = as_strings(labels)
    names = sorted(name for name in values.unique().to_pylist() if name is not None)
    encoded = pc.index_in(values, pa.array(names, pa.string()))
    return np.asarray(encoded.fill_null(UNLABELLED), np.int64), names


def as_strings(labels: Any) -> pa.Array | pa.ChunkedArray:
    """Labels of any of these kinds as strings and nulls."""
    if isinstance(labels, (pa.Array, pa.ChunkedArray)):
        return labels.cast(pa.string())
    return pa.array(labels, pa.string(), from_pandas=True)


def agreement(clusters: NDArray[np.integer], groups: NDArray[np.integer]) -> Agreement:
    """ARI, AMI and V-measure (natural logarithms, arithmetic mean) of clusters against groups.

    Both are ids of shape (N,). Rows whose group is UNLABELLED are left out. A value of one class on
    either side follows scikit-learn: homogeneity of one group and completeness of one cluster are 1.
    """
    clusters, groups = _labelled(clusters, groups)
    if not len(clusters):
        return Agreement(*[np.nan] * 5)
    (rows, columns), cells, (a, b) = _contingency(clusters, groups)
    information = _mutual_information(cells, a[rows], b[columns])
    h_clusters, h_groups = _entropy(a), _entropy(b)
    homogeneity = information / h_groups if h_groups else 1.0
    completeness = information / h_clusters if h_clusters else 1.0
    v = 2 * homogeneity * completeness / (homogeneity + completeness) if homogeneity + completeness else 0.0
    return Agreement(
        ari=_adjusted_rand(cells, a, b),
        ami=_adjusted_information(information, h_clusters, h_groups, a, b),
        homogeneity=homogeneity,
        completeness=completeness,
        v_measure=v,
    )


def joins(
    clusters: NDArray[np.integer], groups: NDArray[np.integer], src: NDArray[np.integer] | None = None
) -> Joins:
    """Pairs of sequences that share cluster, group, or both; all ids of shape (N,), UNLABELLED rows left out.

    With `src` only pairs of different sources count.
    """
    ids = _labelled(clusters, groups) if src is None else _labelled(clusters, groups, src)
    cluster, group, *source = (np.unique(each, return_inverse=True)[1] for each in ids)
    kinds = [(np.zeros(len(cluster), np.int64),), (cluster,), (group,), (cluster, group)]
    within = [_pairs_sharing(*kind, *source) if source else 0 for kind in kinds]
    return Joins(*(_pairs_sharing(*kind) - same for kind, same in zip(kinds, within, strict=True)))


def compare(
    clusters: NDArray[np.integer], groups: NDArray[np.integer], src: NDArray[np.integer] | None = None
) -> dict[str, Any]:
    """All of the above as a dictionary for JSON, NaN as None; joins across sources if `src` is given."""
    has = np.asarray(groups) != UNLABELLED
    return {
        "sequences": int(has.sum()),
        "groups": len(np.unique(np.asarray(groups)[has])),
        **{name: _number(value) for name, value in asdict(agreement(clusters, groups)).items()},
        "join": joins(clusters, groups).scores(),
        "join_across_sources": None if src is None else joins(clusters, groups, src).scores(),
    }


def intervals(
    clusters: NDArray[np.integer],
    groups: NDArray[np.integer],
    src: NDArray[np.integer],
    weights: Iterable[NDArray[np.float64]],
) -> dict[str, Any]:
    """95 % intervals [low, high] of the figures of `compare` when sources are drawn again; None if undefined.

    `src` (N,) are positions 0 to G-1; each of `weights` (G,) says how often every source is drawn. Pairs
    of one source count once for each time it is drawn, and never between its copies. AMI has none: what
    chance would give is expensive to compute.
    """
    has = np.asarray(groups) != UNLABELLED
    cluster, group = (np.unique(np.asarray(each)[has], return_inverse=True)[1] for each in (clusters, groups))
    source, n = np.asarray(src)[has], int(np.max(src, initial=-1)) + 1
    cell = np.unique(cluster * (int(group.max(initial=0)) + 1) + group, return_inverse=True)[1]
    tables = [_by_group(kind, source, n) for kind in (np.zeros(len(source), np.int64), cluster, group, cell)]
    draws = np.array([_redrawn(tables, w) for w in weights]).reshape(-1, len(_REDRAWN))
    ends = [_ends(column) for column in draws.T]
    found: dict[str, Any] = dict(zip(_REDRAWN, ends, strict=True))
    for kind in ("join", "join_across_sources"):
        found[kind] = {name: found.pop(f"{kind} {name}") for name in ("precision", "recall", "f1")}
    return found


_REDRAWN = (
    "ari", "homogeneity", "completeness", "v_measure",
    "join precision", "join recall", "join f1",
    "join_across_sources precision", "join_across_sources recall", "join_across_sources f1",
)  # fmt: skip


def _by_group(kind: NDArray[np.int64], source: NDArray[np.int64], n: int) -> sparse.csr_array:
    """Sequences of each source in each group, (groups, sources)."""
    shape = (int(kind.max(initial=-1)) + 1, n)
    return sparse.coo_array((np.ones(len(kind)), (kind, source)), shape=shape).tocsr()


def _redrawn(tables: list[sparse.csr_array], w: NDArray[np.float64]) -> tuple[float, ...]:
    """The figures of `_REDRAWN` when sources count so often; tables: all, clusters, groups, their cells."""
    sizes = [table @ w for table in tables]
    own = [float(((table.data**2) * w[table.indices] ** 2).sum()) for table in tables]
    within = [float((table.data * (table.data - 1) * w[table.indices]).sum()) / 2 for table in tables]
    across = [float((size**2).sum() - same) / 2 for size, same in zip(sizes, own, strict=True)]
    every = [a + b for a, b in zip(across, within, strict=True)]
    total = float(sizes[0].sum())
    h_clusters, h_groups, h_cells = (_weighted_entropy(size, total) for size in sizes[1:])
    information = h_clusters + h_groups - h_cells
    homogeneity = information / h_groups if h_groups > 0 else 1.0
    completeness = information / h_clusters if h_clusters > 0 else 1.0
    both = homogeneity + completeness
    v = 2 * homogeneity * completeness / both if both > 0 else 0.0
    pairs, joined, together, right = every
    chance = joined * together / pairs if pairs else np.nan
    room = (joined + together) / 2 - chance
    ari = (right - chance) / room if room > 0 else np.nan
    found = [ari, homogeneity, completeness, v] if total else [np.nan] * 4
    for _, claimed, actual, hit in (every, across):
        found += [_share(hit, claimed), _share(hit, actual), _share(2 * hit, claimed + actual)]
    return tuple(found)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else np.nan


def _weighted_entropy(sizes: NDArray[np.float64], total: float) -> float:
    p = sizes[sizes > 0] / max(total, 1)
    return float(-(p * np.log(p)).sum())


def _ends(draws: NDArray[np.float64]) -> list[float] | None:
    kept = draws[np.isfinite(draws)]
    return [float(end) for end in np.percentile(kept, (2.5, 97.5))] if len(kept) else None


def _f1(right: int, claimed: int, actual: int) -> dict[str, float | None]:
    return {
        "precision": _ratio(right, claimed),
        "recall": _ratio(right, actual),
        "f1": _ratio(2 * right, claimed + actual),
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _labelled(*ids: NDArray[np.integer]) -> list[NDArray[np.int64]]:
    """Ids (the second are groups) of the rows that have a group."""
    if len({np.shape(each) for each in ids}) > 1:
        raise DataError(
            f"ids of shapes {', '.join(str(np.shape(each)) for each in ids)}; give one id per row"
        )
    has = np.asarray(ids[1]) != UNLABELLED
    return [np.asarray(each, np.int64)[has] for each in ids]


def _pairs_sharing(*positions: NDArray[np.int64]) -> int:
    """Number of unordered pairs of rows that agree in every one of these; each counts from 0."""
    code, codes = positions[0], int(positions[0].max(initial=0)) + 1
    for each in positions[1:]:
        size = int(each.max(initial=0)) + 1
        if codes * size >= 2**63:
            values, code = np.unique(code, return_inverse=True)
            codes = len(values)
        code, codes = code * size + each, codes * size
    counts = np.unique(code, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _contingency(
    clusters: NDArray[np.int64], groups: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Filled cells as positions (2, K) and counts (K,), and the sizes of clusters and of groups."""
    _, i, a = np.unique(clusters, return_inverse=True, return_counts=True)
    _, j, b = np.unique(groups, return_inverse=True, return_counts=True)
    where, counts = np.unique(i * len(b) + j, return_counts=True)
    return np.stack(np.divmod(where, len(b))), counts, (a, b)


def _entropy(sizes: NDArray[np.int64]) -> float:
    p = sizes / sizes.sum()
    return float(-(p * np.log(p)).sum())


def _mutual_information(cells: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    n = int(cells.sum())
    information = cells / n * (np.log(cells) + np.log(n) - np.log(a) - np.log(b))
    return max(float(information.sum()), 0.0)


def _adjusted_rand(cells: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Hubert and Arabie, Comparing partitions, 1985. Python integers: pairs of pairs exceed 64 bits."""
    both, joined, together = (int((x * (x - 1) // 2).sum()) for x in (cells, a, b))
    n = int(cells.sum())
    pairs = n * (n - 1) // 2
    if joined == together == both:
        return 1.0
    chance = joined * together / pairs
    return (both - chance) / ((joined + together) / 2 - chance)


def _adjusted_information(
    information: float, h_a: float, h_b: float, a: NDArray[np.int64], b: NDArray[np.int64]
) -> float:
    """Vinh, Epps and Bailey, Information theoretic measures for clusterings comparison, JMLR 2010."""
    if (len(a) == len(b) == 1) or (len(a) == len(b) == int(a.sum())):
        return 1.0
    sizes_a, times_a = np.unique(a, return_counts=True)
    sizes_b, times_b = np.unique(b, return_counts=True)
    log_factorial = gammaln(np.arange(int(a.sum()) + 1) + 1.0)
    chance = float(_expected_information(sizes_a, times_a, sizes_b, times_b, log_factorial))
    room = (h_a + h_b) / 2 - chance
    if abs(room) < 1e-12:  # every partition of these sizes agrees as well as any other
        return 0.0
    return (information - chance) / room


@nb.njit(cache=True)
def _expected_information(a, times_a, b, times_b, log_factorial):  # type: ignore[no-untyped-def]
    """Mean mutual information of random partitions with these distinct sizes, each `times` often.

    A cell of sizes x and y holds k with hypergeometric probability. The sum starts at its mode and
    walks both ways, by the ratio of neighbouring terms, until they no longer count.
    """
    n = log_factorial.size - 1
    f = log_factorial
    total = 0.0
    for i in range(a.size):
        for j in range(b.size):
            x, y = a[i], b[j]
            low, high = max(1, x + y - n), min(x, y)
            mode = min(max((x + 1) * (y + 1) // (n + 2), low), high)
            log_p = f[x] + f[y] + f[n - x] + f[n - y] - f[n] - f[mode] - f[x - mode] - f[y - mode]
            start = np.exp(log_p - f[n - x - y + mode])
            scale = np.log(n) - np.log(x) - np.log(y)
            cell, p, k = 0.0, start, mode
            while k <= high and p > 1e-18:
                cell += p * k * (np.log(k) + scale)
                p *= (x - k) * (y - k) / ((k + 1.0) * (n - x - y + k + 1))
                k += 1
            p, k = start, mode
            while k > low and p > 1e-18:
                p *= k * (n - x - y + k) / ((x - k + 1.0) * (y - k + 1))
                k -= 1
                cell += p * k * (np.log(k) + scale)
            total += cell / n * times_a[i] * times_b[j]
    return total
