"""Intervals: resamples against the same written out, memory, and how often they hold what they should."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rayscan.config import EvaluateConfig
from rayscan.evaluation.blockwise import own_counts, pair_statistics
from rayscan.evaluation.intervals import Resamples, figure, left_out_draws, pair_changes, separation_draws
from rayscan.evaluation.jackknife import DEPTH, macro_f1_without
from rayscan.evaluation.neighbours import macro_f1, top_k, vote
from rayscan.evaluation.pairs import different_sums, same_sums
from rayscan.evaluation.parts import by_label, by_source
from rayscan.evaluation.protocol import ClusterData, evaluate
from rayscan.evaluation.tiles import in_threads
from rayscan.methods.floors import random_unit

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def population(source: Ids, labels: int, seed: int, width: int = 16) -> tuple[Floats, Ids]:
    """Sources around the middle of their label, and the labels of the sequences."""
    n = int(source.max()) + 1
    of = np.arange(n) % labels
    middle = random_unit(labels, width, seed)[of] + 0.8 * random_unit(n, width, seed + 1)
    rows = middle[source] + 0.8 * random_unit(len(source), width, seed + 2)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), of[source]


def test_resamples_are_drawn_anew_and_come_out_the_same() -> None:
    drawn = Resamples(50, 3, 7)
    rng = np.random.default_rng(7)
    expected = [np.bincount(rng.integers(0, 50, 50), minlength=50) for _ in range(3)]
    for _ in range(2):
        np.testing.assert_array_equal(list(drawn), expected)
    assert len(drawn) == 3 and list(Resamples(50, 0, 7)) == []


def test_a_source_that_dominates_is_redrawn_with_all_its_pairs() -> None:
    """Against every pair written out; one source has more pairs than are held one by one."""
    source = np.repeat(np.arange(12), [200, *([3] * 10), 1])
    vectors, _ = population(source, 3, 0)
    weights = Resamples(12, 20, 0)
    counts = pair_statistics(vectors, source)
    draws = separation_draws(vectors, source, counts, own_counts(vectors, source), weights)
    i, j = np.triu_indices(len(source), 1)
    similarity, same = (vectors @ vectors.T)[i, j].astype(np.float64), source[i] == source[j]
    others = np.sort(similarity[~same])
    ranks = np.searchsorted(others, similarity[same]) / len(others)
    for number, w in enumerate(weights):
        times = w[source[i[same]]]
        assert draws["auroc"][number] == pytest.approx(times @ ranks / times.sum(), abs=1e-4)
        mean = times @ similarity[same] / times.sum()
        assert draws["mean_same"][number] == pytest.approx(mean, abs=2e-5)


def peak_mb(task: Any, *given: Any) -> float:
    tracemalloc.start()
    task(*given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def test_one_source_may_have_everything() -> None:
    """Its 12.5 million pairs would take 150 MB to hold, and more to gather."""
    source = np.repeat(np.arange(101), [5000, *([2] * 100)])
    vectors, _ = population(source, 3, 0)
    by_source(vectors[:100], source[:100], Resamples(1, 2, 0), in_threads)  # compiles
    assert peak_mb(by_source, vectors, source, Resamples(101, 20, 0), in_threads) < 80


def test_memory_does_not_grow_with_resamples() -> None:
    """100 times 200,000 weights would fill 160 MB."""
    data = ClusterData(np.arange(200_000) // 2, np.arange(200_000))
    assert peak_mb(evaluate, {}, EvaluateConfig(bootstrap=100), {"2024-03": data}) < 100


@dataclass(frozen=True)
class OneMore(Resamples):
    """One resample, in which a source counts a little more."""

    source: int = 0

    def __iter__(self) -> Iterator[NDArray[np.float64]]:
        w = np.ones(self.n_sources)
        w[self.source] += 1e-4
        yield w


def test_both_sides_of_an_auroc_move() -> None:
    """What a source adds by label is the derivative of the AUROC of all pairs by its weight."""
    source = np.repeat(np.arange(15), 3)
    vectors, label = population(source, 3, 1)
    counts = pair_statistics(vectors, label, exclude=source)
    i, j = np.triu_indices(45, 1)
    apart = source[i] != source[j]
    i, j = i[apart], j[apart]
    similarity, same = (vectors @ vectors.T)[i, j], label[i] == label[j]
    above = similarity[same][:, None] > similarity[~same]

    def auroc(w: NDArray[np.float64]) -> float:
        times = w[source[i]] * w[source[j]]
        return float(times[same] @ above @ times[~same] / times[same].sum() / times[~same].sum())

    for one in (0, 7, 14):
        weights = OneMore(15, 1, 0, one)
        changes = 0.0
        for summed, ranks in (
            (same_sums, counts.ranks()),
            (different_sums, counts.ranks_from_above()),
        ):
            sums, numbers = summed(vectors, label, ranks[None], exclude=source)
            changes += pair_changes(sums[0], numbers, source, weights)[0]
        (w,) = weights
        assert changes == pytest.approx(auroc(w) - auroc(np.ones(15)), rel=5e-3)


def test_votes_without_a_source_are_those_of_the_others() -> None:
    """Against every source left out and everything voted on again; the last one alone has its label."""
    rng = np.random.default_rng(2)
    source = np.sort(rng.integers(0, 14, 60))
    vectors, label = population(source, 3, 2, width=4)
    label[source == source.max()] = 3
    index, _ = top_k(vectors, DEPTH, source)
    for k in (1, 3, 7):
        found = macro_f1_without(index, label, source, k)
        for gone in range(14):
            rest = source != gone
            again, _ = top_k(vectors[rest], k, source[rest])
            truth = label[rest]
            assert found[gone] == pytest.approx(macro_f1(truth, vote(again, truth)), abs=1e-12)


def test_a_source_with_the_whole_list_leaves_the_vote_as_it_was() -> None:
    """The first source is all that the second sees: of 20 equal sequences, the list has the first 16."""
    vectors = np.repeat(np.float32([[1, 0], [0, 1]]), [21, 10], axis=0)
    source = np.r_[np.zeros(20, np.int64), 1, np.repeat([2, 3], 5)]
    label = np.r_[np.zeros(21, np.int64), np.ones(10, np.int64)]
    index, _ = top_k(vectors, DEPTH, source)
    found = macro_f1_without(index, label, source, 3)
    assert found[0] == 1 and found[2] < 1


def test_leaving_out_more_moves_more() -> None:
    without = np.array([0.5, 0.5, 0.6, 0.4])
    draws = left_out_draws(0.5, without, Resamples(4, 50, 0))
    assert figure(0.5, draws, 4)["low"] < 0.5 < figure(0.5, draws, 4)["high"]
    times = np.array(list(Resamples(4, 50, 0)))
    np.testing.assert_allclose(draws - 0.5, 0.75 * (0.1 * (times[:, 3] - times[:, 2])), atol=1e-12)


def held(found: list[dict[str, Any]], truth: float) -> float:
    """The share of intervals that hold it."""
    return float(np.mean([one["low"] <= truth <= one["high"] for one in found]))


def one_by_one(task: Any, items: Any, shared: Any) -> Iterator[Any]:
    """The map without threads, which take longer to start than these items do."""
    return (task(item, shared) for item in items)


def test_intervals_by_label_hold_what_they_should() -> None:
    """Of 120 samples of 60 sources of one population: its AUROC and means, and the usual score of a vote."""
    everything = np.repeat(np.arange(2000), 3)
    vectors, label = population(everything, 4, 3)
    whole = pair_statistics(vectors, label, exclude=everything)
    source, weights = np.repeat(np.arange(60), 3), Resamples(60, 100, 0)
    found = []
    with threadpool_limits(1, user_api="blas"):
        for sample in range(120):
            chosen = np.random.default_rng(sample).choice(2000, 60, replace=False)
            rows = (chosen[:, None] * 3 + np.arange(3)).ravel()
            found.append(by_label(vectors[rows], label[rows], source, source, weights, one_by_one))
    assert held([one["auroc"] for one in found], whole.auroc()) >= 0.88
    assert held([one["mean_same"] for one in found], whole.mean_same) >= 0.85
    assert held([one["mean_different"] for one in found], whole.mean_different) >= 0.85
    for k in ("1", "5"):
        scores = [one["knn_macro_f1"][k] for one in found]
        assert held(scores, float(np.mean([one["value"] for one in scores]))) >= 0.92, k
