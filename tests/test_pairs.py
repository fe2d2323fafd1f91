"""Pair statistics against every pair written out, and against scikit-learn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from sklearn.metrics import average_precision_score, roc_auc_score

from rayscan.errors import DataError
from rayscan.evaluation import pairs, tiles
from rayscan.evaluation.blockwise import Compared, compare, nearest, own_counts, pair_statistics, retrieval
from rayscan.evaluation.pairs import BINS, PairCounts, centres, different_sums, same_pairs, same_sums

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def around(groups: Ids, d: int, spread: float, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((int(groups.max()) + 1, d))
    rows = middle[groups] + spread * rng.standard_normal((len(groups), d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def written_out(vectors: Floats, groups: Ids, exclude: Ids | None = None) -> tuple[NDArray[np.float64], Ids]:
    """Similarity of each pair, and whether it is of one group."""
    v = vectors.astype(np.float64)
    kept = [
        (v[i] @ v[j], groups[i] == groups[j])
        for i, j in combinations(range(len(v)), 2)
        if exclude is None or exclude[i] != exclude[j]
    ]
    return np.array([s for s, _ in kept]), np.array([same for _, same in kept], np.int64)


def equal(a: PairCounts, b: PairCounts) -> None:
    np.testing.assert_array_equal(a.same, b.same)
    np.testing.assert_array_equal(a.different, b.different)
    assert a.sum_same == pytest.approx(b.sum_same, abs=1e-5)
    assert a.sum_different == pytest.approx(b.sum_different, abs=1e-5)


def test_three_vectors_at_known_angles() -> None:
    """0, 60 and 180 degrees: cosines 0.5 (same group), -1 and -0.5 (different)."""
    angle = np.deg2rad([0, 60, 180])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    counts = pair_statistics(vectors, np.array([7, 7, 9]), bins=5)
    assert counts.same.tolist() == [0, 0, 0, 1, 0]
    assert counts.different.tolist() == [1, 1, 0, 0, 0]
    assert counts.mean_same == pytest.approx(0.5, abs=1e-7)
    assert counts.mean_different == pytest.approx(-0.75, abs=1e-7)
    assert counts.auroc() == counts.average_precision() == 1


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_figures_agree_with_scikit_learn(spread: float) -> None:
    groups = np.random.default_rng(1).integers(0, 30, 150)
    vectors = around(groups, 16, spread, 2)
    similarity, same = written_out(vectors, groups)
    counts = pair_statistics(vectors, groups)
    assert (counts.n_same, counts.n_different) == (same.sum(), (1 - same).sum())
    assert counts.auroc() == pytest.approx(roc_auc_score(same, similarity), abs=1e-5)
    assert abs(counts.auroc() - roc_auc_score(same, similarity)) <= counts.auroc_error() + 1e-9
    assert counts.average_precision() == pytest.approx(average_precision_score(same, similarity), abs=1e-3)
    assert counts.mean_same == pytest.approx(similarity[same == 1].mean(), abs=1e-6)
    assert counts.mean_different == pytest.approx(similarity[same == 0].mean(), abs=1e-6)


def test_bins_are_fine_enough_where_all_is_alike() -> None:
    """An untrained encoder: every similarity above 0.99. Bins must still rank the pairs."""
    groups = np.random.default_rng(10).integers(0, 40, 300)
    vectors = np.eye(16, dtype=np.float32)[0] + 0.05 * around(groups, 16, 1.0, 10)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity, same = written_out(vectors, groups)
    counts = pair_statistics(vectors, groups)
    assert similarity.min() > 0.99
    assert counts.auroc() == pytest.approx(roc_auc_score(same, similarity), abs=1e-4)


def test_ties_are_shared() -> None:
    """One direction only: no pair can be told from another."""
    vectors = np.tile(np.float32([[0.6, 0.8]]), (6, 1))
    groups = np.array([0, 0, 0, 1, 1, 2])
    counts = pair_statistics(vectors, groups)
    assert counts.auroc() == 0.5
    assert counts.average_precision() == pytest.approx(4 / 15)


def test_similarities_beyond_one_are_counted() -> None:
    vectors = np.float32([[1.0001, 0], [1.0001, 0], [-1.0001, 0]])
    counts = pair_statistics(vectors, np.array([0, 0, 1]))
    assert counts.same[-1] == 1 and counts.different[0] == 2
    assert counts.mean_same == 1 and counts.mean_different == -1
    _, same, different = counts.coarse(50)
    assert same[-1] == 1 and different[0] == 2


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_vectors_leave_all_undefined(n: int) -> None:
    counts = pair_statistics(np.zeros((n, 4), np.float32), np.zeros(n, np.int64))
    assert counts.n_same == counts.n_different == 0
    figures = [counts.auroc(), counts.average_precision(), counts.mean_same, counts.mean_different]
    assert np.isnan([*figures, counts.auroc_error()]).all()
    found = nearest(np.zeros((n, 4), np.float32), np.zeros(n, np.int64))
    assert found.index.tolist() == [-1] * n
    assert np.isnan(retrieval(found, np.zeros(n, np.int64))).all()


def test_one_group_alone() -> None:
    vectors = around(np.arange(5), 8, 0, 0)
    counts = pair_statistics(vectors, np.zeros(5, np.int64))
    assert (counts.n_same, counts.n_different) == (10, 0)
    assert np.isnan(counts.auroc()) and np.isnan(counts.average_precision())


@given(st.integers(0, 10**6), st.integers(2, 40), st.booleans())
@settings(max_examples=25, deadline=None)
def test_excluded_pairs_do_not_count(seed: int, n: int, sparse_rows: bool) -> None:
    rng = np.random.default_rng(seed)
    groups, sources = rng.integers(0, 4, n), rng.integers(-2, 6, n)
    vectors = around(groups, 6, 1.0, seed) * (rng.random((n, 6)) < 0.6)
    vectors = vectors.astype(np.float32)
    similarity, same = written_out(vectors, groups, sources)
    rows = sparse.csr_array(vectors) if sparse_rows else vectors
    counts = pair_statistics(rows, groups, exclude=sources)
    assert (counts.n_same, counts.n_different) == (same.sum(), (1 - same).sum())
    assert counts.sum_same == pytest.approx(similarity[same == 1].sum(), abs=1e-5)
    assert counts.sum_different == pytest.approx(similarity[same == 0].sum(), abs=1e-5)
    if 0 < same.sum() < len(same):
        assert abs(counts.auroc() - roc_auc_score(same, similarity)) <= counts.auroc_error() + 1e-9


def same_bits(a: Compared, b: Compared) -> None:
    for one, other in ((a.counts, b.counts), (a.nearest, b.nearest), (a.neighbours, b.neighbours)):
        for x, y in zip(vars(one).values(), vars(other).values(), strict=True):
            np.testing.assert_array_equal(x, y)


def backwards(task: Any, items: Sequence[Any], shared: Any) -> Iterable[Any]:
    """A map whose work is done in another order."""
    return reversed([task(item, shared) for item in reversed(items)])


@pytest.mark.parametrize("sparse_rows", [False, True])
def test_blocks_and_workers_change_no_bit(monkeypatch: pytest.MonkeyPatch, sparse_rows: bool) -> None:
    """Rows as real ones are, many of them equal: counts, sums of floats, ties and neighbours."""
    monkeypatch.setattr(tiles, "SIZE", 32)
    monkeypatch.setattr(tiles, "_DENSE_CELLS", 80)  # sparse tiles narrower than high
    rng = np.random.default_rng(3)
    groups, sources = rng.integers(0, 40, 700), rng.integers(0, 90, 700)
    vectors = around(groups, 24, 0.7, 3)
    vectors[rng.integers(0, 700, 200)] = vectors[:10].repeat(20, axis=0)
    rows = sparse.csr_array(vectors) if sparse_rows else vectors
    whole = compare(rows, groups, exclude=sources, nearest=True, k=5, block=700)
    for block in (32, 64, 352):
        for way in (tiles.in_threads, backwards):
            again = compare(rows, groups, exclude=sources, nearest=True, k=5, block=block, map=way)
            same_bits(whole, again)
    full = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(full, -2)
    np.testing.assert_allclose(whole.nearest.similarity, full.max(1), atol=1e-6)
    full[sources[:, None] == sources] = -2
    np.testing.assert_allclose(whole.neighbours.similarity, -np.sort(-full, 1)[:, :5], atol=1e-6)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_sums_over_a_group_are_the_same_for_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    monkeypatch.setattr(tiles, "SIZE", 16)
    rng = np.random.default_rng(4)
    groups, sources = rng.integers(0, 4, 300), rng.integers(0, 60, 300)
    tables = np.stack([centres(), centres() ** 2])
    once = same_sums(around(groups, 8, 0.7, 4), groups, tables, exclude=sources)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    for a, b in zip(once, same_sums(around(groups, 8, 0.7, 4), groups, tables, exclude=sources), strict=True):
        np.testing.assert_array_equal(a, b)


def test_order_of_rows_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    vectors = (rng.integers(-4, 5, (60, 8)) / 16).astype(np.float32)
    groups, order = rng.integers(0, 9, 60), rng.permutation(60)
    equal(pair_statistics(vectors, groups), pair_statistics(vectors[order], groups[order]))
    once = retrieval(nearest(vectors, groups), groups)
    assert retrieval(nearest(vectors[order], groups[order]), groups[order]) == pytest.approx(once, abs=1e-12)


def test_coarse_histogram_is_that_of_the_bin_centres() -> None:
    groups = np.random.default_rng(7).integers(0, 5, 60)
    counts = pair_statistics(around(groups, 4, 1.0, 7), groups)
    edges, same, different = counts.coarse(50)
    assert len(edges) == 51 and edges[0] == -1 and edges[-1] == 1
    np.testing.assert_array_equal(same, np.histogram(centres(), edges, weights=counts.same)[0])
    assert different.sum() == counts.n_different


def test_nearest_is_the_most_similar_other() -> None:
    groups = np.random.default_rng(8).integers(0, 20, 120)
    vectors = around(groups, 12, 0.8, 8)
    full = vectors @ vectors.T
    np.fill_diagonal(full, -2)
    found = nearest(vectors, groups)
    np.testing.assert_array_equal(found.index, full.argmax(1))
    np.testing.assert_allclose(found.similarity, full.max(1), atol=1e-6)
    hit = groups[full.argmax(1)] == groups
    several = np.bincount(groups)[groups] > 1
    micro, macro = retrieval(found, groups)
    assert micro == pytest.approx(hit[several].mean())
    each = [hit[groups == g].mean() for g in np.unique(groups) if (groups == g).sum() > 1]
    assert macro == pytest.approx(np.mean(each))


def test_equal_neighbours_share_the_hit() -> None:
    """Four equal vectors, two of a group: one of the three others is right, for each of the two."""
    vectors = np.tile(np.float32([[0.6, 0.8]]), (5, 1))
    vectors[4] = [0, 1]
    groups = np.array([3, 1, 3, 2, 9])
    found = nearest(vectors, groups)
    assert found.ties.tolist() == [3, 3, 3, 3, 4]
    np.testing.assert_allclose(found.same, [1 / 3, 0, 1 / 3, 0, 0])
    assert found.index.tolist() == [1, 0, 0, 0, 0]
    assert retrieval(found, groups) == pytest.approx((1 / 3, 1 / 3))


def test_opposite_vectors_still_have_a_nearest() -> None:
    found = nearest(np.float32([[1, 0], [-1, 0]]), np.array([0, 0]))
    assert found.index.tolist() == [1, 0] and found.similarity.tolist() == [-1, -1]


def test_same_pairs_and_sums_are_those_of_the_histogram() -> None:
    rng = np.random.default_rng(9)
    groups, sources = rng.integers(0, 15, 200), rng.integers(0, 50, 200)
    vectors = around(groups, 8, 0.7, 9)
    counts = pair_statistics(vectors, groups)
    of, at = same_pairs(vectors, groups)
    assert len(of) == counts.n_same
    size = np.bincount(groups)
    np.testing.assert_array_equal(np.bincount(of, minlength=15), size * (size - 1) // 2)
    assert centres()[at].sum() == pytest.approx(counts.sum_same, abs=1e-2)
    sums, numbers = same_sums(vectors, groups, counts.ranks()[None])
    assert sums.sum() / numbers.sum() == pytest.approx(counts.auroc(), abs=1e-6)
    full = (vectors @ vectors.T).astype(np.float64)
    counted = (groups[:, None] == groups) & (sources[:, None] != sources)
    sums, numbers = same_sums(vectors, groups, centres()[None], exclude=sources)
    np.testing.assert_array_equal(numbers, counted.sum(1))
    np.testing.assert_allclose(sums[0], (full * counted).sum(1), atol=1e-3)


def corners(n: int, seed: int) -> Floats:
    """Vectors whose products are exact in float32, so that no order of adding moves a pair to another bin."""
    return np.random.default_rng(seed).choice(np.float32([-0.25, 0.25]), (n, 16))


def test_own_counts_are_those_of_each_group() -> None:
    """One group has more pairs than are held one by one, others a few, one or none."""
    groups = np.random.default_rng(10).permutation(np.repeat(np.arange(6), [1, 200, 2, 40, 3, 1]))
    vectors = corners(len(groups), 10)
    found = own_counts(vectors, groups)
    assert found.shape == (6, BINS) and found.nnz < 6 * 17
    for group in range(6):
        rows = vectors[groups == group]
        i, j = np.triu_indices(len(rows), 1)
        at = np.round(((rows @ rows.T)[i, j] + 1) * (BINS - 1) / 2).astype(np.int64)
        np.testing.assert_array_equal(found[[group]].toarray()[0], np.bincount(at, minlength=BINS))
    np.testing.assert_array_equal(found.sum(axis=0), pair_statistics(vectors, groups).same)
    assert own_counts(sparse.csr_array(vectors), groups).nnz == found.nnz
    assert own_counts(vectors[:0], groups[:0]).shape == (0, BINS)


def test_different_sums_are_those_of_all_other_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    groups, sources = rng.integers(0, 5, 200), rng.integers(0, 50, 200)
    vectors = around(groups, 8, 0.7, 11)
    full = (vectors @ vectors.T).astype(np.float64)
    counted = (groups[:, None] != groups) & (sources[:, None] != sources)
    for rows in (vectors, sparse.csr_array(vectors)):
        sums, numbers = different_sums(rows, groups, centres()[None], exclude=sources)
        np.testing.assert_array_equal(numbers, counted.sum(1))
        np.testing.assert_allclose(sums[0], (full * counted).sum(1), atol=5e-3)
    monkeypatch.setattr(pairs, "_OTHERS", 100)
    some = np.zeros(200, bool)
    some[np.linspace(0, 199, 100).astype(int)] = True
    sums, numbers = different_sums(vectors, groups, centres()[None], exclude=sources)
    np.testing.assert_array_equal(numbers, (counted & some).sum(1))
    counts = pair_statistics(vectors, groups, exclude=sources)
    ranks, from_above = (each[None] for each in (counts.ranks(), counts.ranks_from_above()))
    monkeypatch.undo()
    for summed, table in ((same_sums, ranks), (different_sums, from_above)):
        sums, numbers = summed(vectors, groups, table, exclude=sources)
        assert sums.sum() / numbers.sum() == pytest.approx(counts.auroc(), abs=1e-6)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((2, 2), np.float32), "squared length 2"),
        (np.float32([[1, 0], [np.nan, 0]]), "vector 1"),
        (np.float32([[1, 0], [np.inf, 0]]), "vector 1"),
        (np.ones((2, 2)) / 2, "float64"),
        (np.zeros((3, 2), np.float32), "3 vectors but ids of shape"),
    ],
)
def test_vectors_that_have_no_cosine_are_refused(vectors: Floats, message: str) -> None:
    for function in (pair_statistics, nearest):
        with pytest.raises(DataError, match=message):
            function(vectors, np.array([0, 1]))


def test_an_even_number_of_bins_is_refused() -> None:
    with pytest.raises(DataError, match="odd"):
        pair_statistics(np.eye(2, dtype=np.float32), np.array([0, 1]), 4)
