from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from rayscan.config import EvaluateConfig
from rayscan.evaluation.partitions import UNLABELLED
from rayscan.methods.clustered import CANDIDATES, Members, candidates, communities, joins_f1, scores

CONFIG = EvaluateConfig(bootstrap=50)


def members(groups: int, angle: float, seed: int, sources_each: int = 3) -> Members:
    """Sources with four sequences each, spread by `angle` around the centre of their group."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.standard_normal((16, 16)))[0][:groups]
    source = np.repeat(np.arange(groups * sources_each), 4)
    vectors = centres[source // sources_each] + angle * rng.standard_normal((len(source), 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Members(vectors.astype(np.float32), source, source // sources_each)


def drawn_pairs(members: Members, cluster: np.ndarray, kind: str, weights: np.ndarray) -> float:
    """F1 by walking over the pairs, each as often as its sources were drawn."""
    joined = together = both = 0.0
    for i, j in combinations(range(len(cluster)), 2):
        a, b = members.source[i], members.source[j]
        if kind == "label" and (a == b or UNLABELLED in (members.label[i], members.label[j])):
            continue
        times = weights[a] if a == b else weights[a] * weights[b]
        alike = a == b if kind == "source" else members.label[i] == members.label[j]
        joined += times * (cluster[i] == cluster[j])
        together += times * alike
        both += times * (alike and cluster[i] == cluster[j])
    return 2 * both / (joined + together) if joined + together else np.nan


@pytest.mark.parametrize("kind", ["source", "label"])
def test_pairs_are_counted_as_often_as_sources_are_drawn(kind: str) -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 3, 6)
    label[2] = UNLABELLED
    source = np.sort(rng.integers(0, 6, 40))
    found = Members(np.zeros((40, 1), np.float32), source, label[source])
    cluster = rng.integers(0, 5, 40)
    weights = rng.integers(0, 3, (4, 6)).astype(float)
    expected = [drawn_pairs(found, cluster, kind, each) for each in weights]
    np.testing.assert_allclose(joins_f1(found, cluster, kind, weights), expected)


def test_the_threshold_is_chosen_on_validation_and_tight_clusters_score() -> None:
    """Sources cannot be told within a group, so joins of labels are perfect and those of sources are not."""
    validation, tests = members(4, 0.02, 0), {"test": members(5, 0.02, 1)}
    of_label, of_source = (
        scores(validation, tests, kind, CONFIG)["parts"]["test"] for kind in ("label", "source")
    )
    assert of_label["f1"]["value"] == 1 and of_label["clusters"] == 5
    assert of_source["f1"]["value"] < 0.9
    assert of_source["f1"]["low"] <= of_source["f1"]["value"] <= of_source["f1"]["high"]


def test_vectors_in_a_cone_are_clustered_as_well() -> None:
    """What all vectors share raises all similarities: quantiles follow, a fixed grid would not."""
    tests = {"test": members(5, 0.02, 1)}

    def shifted(one: Members) -> Members:
        vectors = np.hstack([one.vectors, np.full((len(one.vectors), 1), 20, np.float32)])
        return Members(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), one.source, one.label)

    found = scores(shifted(members(4, 0.02, 0)), {"test": shifted(tests["test"])}, "label", CONFIG)
    assert found["threshold"] > 0.99 and found["parts"]["test"]["f1"]["value"] == 1


def test_candidates_rise_from_the_middle() -> None:
    rows = members(4, 0.3, 0).vectors
    found = candidates(rows, 0)
    assert found == sorted(set(found)) and len(found) > CANDIDATES / 2
    similarity = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
    assert found[0] == pytest.approx(np.median(similarity), abs=0.01)
    assert candidates(rows[:1], 0) == [] == candidates(rows[:0], 0)


def test_nothing_to_choose_by() -> None:
    """One sequence a source, no labels."""
    some = members(4, 0.1, 0)
    lone = Members(some.vectors[::4], np.arange(12), np.full(12, UNLABELLED))
    assert scores(lone, {"test": some}, "source", CONFIG) is None
    assert scores(lone, {"test": some}, "label", CONFIG) is None
    empty = Members(np.zeros((0, 16), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    found = scores(some, {"test": empty}, "source", CONFIG)
    assert found["parts"]["test"] == {
        "f1": {"value": None, "low": None, "high": None, "n": 0}, "clusters": 0,
    }  # fmt: skip


def test_communities_of_two_bundles_and_a_stranger() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(3), [6, 6, 1], axis=0)
    noise = np.pad(0.1 * rng.random((13, 1)), ((0, 0), (3, 2)))
    vectors = (centres @ np.eye(3, 6) + noise * np.r_[np.ones(12), 0][:, None]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = communities(vectors, seed=0)
    assert found.tolist() == [0] * 6 + [1] * 6 + [2]


def test_sources_with_one_vector_are_no_islands() -> None:
    """Five sources of each of two kinds, six equal rows each: the kinds are found, not the sources."""
    rng = np.random.default_rng(0)
    sources = np.eye(2, 8)[np.arange(10) % 2] + 0.1 * rng.random((10, 8))
    sources = (sources / np.linalg.norm(sources, axis=1, keepdims=True)).astype(np.float32)
    found = communities(np.repeat(sources, 6, axis=0), seed=0)
    assert found.tolist() == np.repeat(np.arange(10) % 2, 6).tolist()
