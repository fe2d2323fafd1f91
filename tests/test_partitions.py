"""Agreement of partitions against scikit-learn, and joins against every pair written out."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics

from rayscan.errors import DataError
from rayscan.evaluation.partitions import (
    UNLABELLED,
    Joins,
    agreement,
    compare,
    intervals,
    joins,
    label_codes,
)

Ids = NDArray[np.int64]


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_scores_are_scikit_learns(seed: int, n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, k, n), rng.integers(0, m, n)
    found = agreement(a, b)
    assert found.ari == pytest.approx(metrics.adjusted_rand_score(b, a), abs=1e-9)
    homogeneity, completeness, v = metrics.homogeneity_completeness_v_measure(b, a)
    assert found.homogeneity == pytest.approx(homogeneity, abs=1e-9)
    assert found.completeness == pytest.approx(completeness, abs=1e-9)
    assert found.v_measure == pytest.approx(v, abs=1e-9)
    if n > 1 and max(len(np.unique(a)), len(np.unique(b))) > 1:
        assert found.ami == pytest.approx(metrics.adjusted_mutual_info_score(b, a), abs=1e-6)


def test_large_uneven_clusters() -> None:
    """Sizes over four orders: the far tails of the chance term must not be lost."""
    rng = np.random.default_rng(0)
    a = np.minimum(rng.geometric(0.02, 20_000), 400)
    b = np.where(rng.random(20_000) < 0.4, a % 37, rng.integers(0, 37, 20_000))
    found = agreement(a, b)
    assert found.ami == pytest.approx(metrics.adjusted_mutual_info_score(b, a), abs=1e-9)
    assert found.ari == pytest.approx(metrics.adjusted_rand_score(b, a), abs=1e-9)


def test_many_rows() -> None:
    rng = np.random.default_rng(1)
    src = rng.integers(0, 100_000, 300_000)
    cluster = np.where(rng.random(300_000) < 0.5, src % 5_000, rng.integers(0, 5_000, 300_000))
    found = compare(cluster, src % 300, src)
    assert found["ari"] == pytest.approx(metrics.adjusted_rand_score(src % 300, cluster), abs=1e-9)
    assert 0 < found["ami"] < 1
    join = found["join"]
    assert join["both"] <= min(join["joined"], join["together"])


def written_out(cluster: Ids, label: Ids, src: Ids | None) -> Joins:
    pairs = joined = together = both = 0
    for i, j in combinations(range(len(cluster)), 2):
        if UNLABELLED in (label[i], label[j]) or (src is not None and src[i] == src[j]):
            continue
        pairs += 1
        one, other = cluster[i] == cluster[j], label[i] == label[j]
        joined, together, both = joined + int(one), together + int(other), both + int(one and other)
    return Joins(pairs, joined, together, both)


@given(st.integers(0, 10**6), st.integers(0, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_joins_are_those_of_all_pairs(seed: int, n: int, across: bool) -> None:
    """A source may have several labels and lie in several clusters."""
    rng = np.random.default_rng(seed)
    cluster, label = rng.integers(-3, 4, n), rng.integers(-1, 4, n)
    src = rng.integers(0, 2**32, 9)[rng.integers(0, 9, n)]
    given_src = src if across else None
    assert joins(cluster, label, given_src) == written_out(cluster, label, given_src)


def test_sources_alone_flatter_the_labels() -> None:
    """Clusters that are just the sources: half of all joins are found, and none across sources."""
    src = np.repeat(np.arange(4), 10)
    label = src // 2
    found = compare(src, label, src)
    assert found["join"]["precision"] == 1
    assert found["join"]["recall"] == pytest.approx(180 / 380)
    across = found["join_across_sources"]
    assert (across["precision"], across["recall"], across["f1"]) == (None, 0, 0)
    assert [across[name] for name in ("pairs", "joined", "together", "both")] == [600, 0, 200, 0]
    assert across["cuts"] == {"precision": pytest.approx(2 / 3), "recall": 1, "f1": pytest.approx(0.8)}


def test_scores_of_joins_and_cuts_are_those_of_a_classifier_of_pairs() -> None:
    rng = np.random.default_rng(4)
    cluster, label = rng.integers(0, 4, 40), rng.integers(0, 3, 40)
    i, j = np.triu_indices(40, 1)
    cut, apart = cluster[i] != cluster[j], label[i] != label[j]
    found = joins(cluster, label).scores()
    expected = metrics.classification_report(apart, cut, output_dict=True)
    for kind, name in (("False", found), ("True", found["cuts"])):
        given = {"precision": "precision", "recall": "recall", "f1-score": "f1"}
        assert {key: name[ours] for key, ours in given.items()} == pytest.approx(
            {key: expected[kind][key] for key in given}
        )
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["macro_f1"] == pytest.approx(expected["macro avg"]["f1-score"])
    assert found["weighted_f1"] == pytest.approx(expected["weighted avg"]["f1-score"])


@pytest.mark.parametrize(
    ("cluster", "label", "undefined"),
    [
        ([0, 0, 0], [1, 1, 1], {"macro_f1"}),  # nothing to cut, and nothing cut
        ([0, 1, 2], [0, 1, 2], {"precision", "recall", "f1", "macro_f1"}),  # nothing to join
        ([0, 1, 2], [1, 1, 1], {"precision"}),  # cuts everything
        ([5], [5], {"precision", "recall", "f1", "accuracy", "macro_f1", "weighted_f1"}),  # no pair
    ],
)
def test_scores_without_joins_or_cuts(cluster: list[int], label: list[int], undefined: set[str]) -> None:
    found = joins(np.array(cluster), np.array(label)).scores()
    assert {name for name, value in found.items() if value is None} == undefined


def test_equal_partitions_under_other_names() -> None:
    label = np.array([5, 5, 2, 2, 2, 0])
    found = agreement(np.array([1, 1, 9, 9, 9, 4]), label)
    assert (found.ari, found.ami, found.v_measure) == pytest.approx((1, 1, 1))
    assert joins(label, label) == Joins(15, 4, 4, 4)


def test_one_cluster_of_everything() -> None:
    found = agreement(np.zeros(6, np.int64), np.arange(6) % 3)
    scores = (found.ari, found.ami, found.homogeneity, found.completeness, found.v_measure)
    assert scores == pytest.approx((0, 0, 0, 1, 0), abs=1e-9)


def test_nothing_labelled() -> None:
    found = compare(np.arange(3), np.full(3, UNLABELLED), np.arange(3))
    assert found["sequences"] == found["groups"] == 0
    assert found["ari"] is found["ami"] is found["join"]["f1"] is None


def test_unlabelled_rows_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    cluster, label = rng.integers(0, 5, 50), rng.integers(-1, 4, 50)
    assert agreement(cluster, label) == agreement(cluster[label >= 0], label[label >= 0])


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match="one id per row"):
        joins(np.zeros(3, np.int64), np.zeros(2, np.int64))


LABELS = ['a "quoted" one', "it's", None, "сканер 🛰", "", "a,b\n", 'a "quoted" one', None]


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        np.array(LABELS, object),
        pa.array(LABELS, pa.string()),
        pa.chunked_array([LABELS[:3], LABELS[3:]], pa.string()),
        pa.array(LABELS, pa.string()).dictionary_encode(),
    ],
)
def test_labels_of_any_kind(labels: object) -> None:
    codes, names = label_codes(labels)
    assert codes.dtype == np.int64
    assert names == sorted({name for name in LABELS if name is not None})
    assert [None if code == UNLABELLED else names[code] for code in codes] == LABELS


def test_no_labels_at_all() -> None:
    codes, names = label_codes([None, None])
    assert codes.tolist() == [-1, -1] and names == []
    assert label_codes([])[0].tolist() == []
    assert label_codes(pa.nulls(2))[0].tolist() == [-1, -1]


def test_intervals_are_those_of_sources_drawn_again() -> None:
    """Sources written out as often as they are drawn: copies are others, and pairs of copies are left out."""
    rng = np.random.default_rng(8)
    src = rng.integers(0, 12, 90)
    label, cluster = (src % 3 + (rng.random(90) < 0.2)).astype(np.int64), rng.integers(0, 4, 90)
    cluster[label == 1] = 1
    w = rng.integers(0, 3, 12).astype(np.float64)
    rows = np.concatenate([np.flatnonzero(src == s) for s in range(12) for _ in range(int(w[s]))])
    copy = np.concatenate(
        [np.full((src == s).sum(), number) for s in range(12) for number in range(int(w[s]))]
    )
    i, j = np.triu_indices(len(rows), 1)
    kept = (src[rows][i] != src[rows][j]) | (copy[i] == copy[j])
    found = intervals(cluster, label, src, w[None])
    for across in (False, True):
        counted = kept & (src[rows][i] != src[rows][j]) if across else kept
        joined = (cluster[rows][i] == cluster[rows][j])[counted]
        together = (label[rows][i] == label[rows][j])[counted]
        ends = found["join_across_sources" if across else "join"]
        assert ends["precision"] == pytest.approx([together[joined].mean()] * 2)
        assert ends["recall"] == pytest.approx([joined[together].mean()] * 2)
    assert found["v_measure"] == pytest.approx([metrics.v_measure_score(label[rows], cluster[rows])] * 2)
    once = intervals(cluster, label, src, np.ones((1, 12)))
    assert once["ari"] == pytest.approx([metrics.adjusted_rand_score(label, cluster)] * 2)
    assert once["join"]["f1"] == pytest.approx([joins(cluster, label).scores()["f1"]] * 2)


def test_intervals_of_one_source_and_of_nothing() -> None:
    one = np.zeros(4, np.int64)
    found = intervals(np.arange(4), one, one, np.ones((3, 1)))
    assert found["join_across_sources"] == {"precision": None, "recall": None, "f1": None}
    assert found["join"]["recall"] == [0, 0]
    none = intervals(one, np.full(4, UNLABELLED), one, np.ones((3, 1)))
    assert none["ari"] is None and none["join"]["f1"] is None


def test_a_hundred_thousand_tiny_clusters() -> None:
    src = np.repeat(np.arange(100_000), 2)
    found = compare(src, src // 3, src)
    assert found["join"]["precision"] == 1 and found["join_across_sources"]["joined"] == 0
    ends = intervals(src, src // 3, src, np.random.default_rng(0).poisson(1, (5, 100_000)).astype(np.float64))
    assert ends["join"]["recall"][0] == pytest.approx(found["join"]["recall"], abs=0.02)
