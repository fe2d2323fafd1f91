"""Floors: port shares, and TF-IDF on singular vectors beside statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load, save
from sklearn.decomposition import TruncatedSVD
from tables_of_sequences import sequences_of

from rayscan.errors import DataError
from rayscan.evaluation.splits import TRAIN, UNSEEN_SOURCES
from rayscan.methods import ports
from rayscan.methods.floors import port_vectors

SMALL = ports.Settings(services=2, components=3)


def flows(*port: int) -> list[dict[str, int]]:
    return [{"port": p} for p in port]


def drawn(n: int) -> pa.Table:
    rng = np.random.default_rng(0)
    return sequences_of([flows(*rng.geometric(0.2, 12).tolist()) for _ in range(n)])


def halves(n: int) -> np.ndarray:
    return np.where(np.arange(n) < n // 2, TRAIN, UNSEEN_SOURCES).astype(np.int8)


def test_shares_by_hand() -> None:
    """22 and 80 stand in two training sequences each, 7 in one; 9 only where training does not look."""
    table = sequences_of([flows(80, 80, 22, 7), flows(80, 22), flows(9, 9, 9, 22)])
    fitted = ports.fit_with("port-share", table, np.array([TRAIN, TRAIN, UNSEEN_SOURCES], np.int8), 0, SMALL)
    expected = np.array([[1, 2, 1], [1, 1, 0], [1, 0, 3]])
    found = fitted.embed(table)
    np.testing.assert_allclose(
        found.vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6
    )
    assert found.covered.all() and not found.inferred.any()


def test_tfidf_is_the_exact_floor_where_it_was_learnt() -> None:
    table = drawn(20)
    found = ports.Tfidf.learn(table)(table)
    np.testing.assert_allclose(found.toarray(), port_vectors(table).toarray(), atol=1e-6)


def test_tfidf_leaves_out_what_it_has_not_seen() -> None:
    tfidf = ports.Tfidf.learn(sequences_of([flows(80), flows(80, 22)]))
    found = tfidf(sequences_of([flows(80, 22, 9), flows(9)])).toarray()
    weights = np.array([np.log(3 / 2) + 1, 1])
    np.testing.assert_allclose(found, [weights / np.linalg.norm(weights), [0, 0]], rtol=1e-6)


def test_axes_are_the_singular_vectors() -> None:
    table = drawn(30)
    fitted = ports.fit_with("ports-svd", table, np.zeros(30, np.int8), 0, SMALL)
    assert isinstance(fitted, ports.PortsSvd)
    matrix = ports.Tfidf.learn(table)(table)
    exact = TruncatedSVD(3, algorithm="arpack", random_state=0).fit(matrix).components_.T
    np.testing.assert_allclose(fitted.axes @ fitted.axes.T, exact @ exact.T, atol=2e-3)


def test_two_halves_and_the_clip_by_hand() -> None:
    table = sequences_of([flows(80, 80), flows(22, 22), flows(80, 22)])
    fitted = ports.fit_with("ports-svd", table, np.zeros(3, np.int8), 0, replace(SMALL, clip=0.0))
    of_ports = fitted.embed(table).vectors  # nothing is left of the statistics
    width = of_ports.shape[1] - 2
    assert not of_ports[:, 2:].any() and width > 20
    np.testing.assert_allclose(of_ports[0] @ of_ports[1], 0, atol=1e-6)
    np.testing.assert_allclose(of_ports[0] @ of_ports[2], np.sqrt(0.5), rtol=1e-5)
    both = ports.fit_with("ports-svd", table, np.zeros(3, np.int8), 0, SMALL).embed(table).vectors
    # Two services against one move the third row's entropy by more than a deviation.
    assert both[0] @ both[2] != pytest.approx(of_ports[0] @ of_ports[2], abs=0.01)


@pytest.mark.parametrize("name", ["port-share", "ports-svd"])
def test_saved_and_loaded_it_embeds_alike(name: str) -> None:
    table = drawn(20)
    fitted = ports.fit(name, table, halves(20), 0)
    again = ports.load(load(save(fitted.arrays)), fitted.facts)
    found = fitted.embed(table)
    np.testing.assert_array_equal(found.vectors, again.embed(table).vectors)
    np.testing.assert_array_equal(found.vectors, ports.fit(name, table, halves(20), 0).embed(table).vectors)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-5)
    assert found.vectors.dtype == np.float32 and found.covered.all() and not found.inferred.any()


@pytest.mark.parametrize("name", ["port-share", "ports-svd"])
def test_other_parts_teach_nothing(name: str) -> None:
    table = drawn(20)
    alone = ports.fit(name, table.slice(0, 10), np.zeros(10, np.int8), 0)
    inductive = ports.fit(name, table, halves(20), 0)
    assert {k: v.tolist() for k, v in inductive.arrays.items()} == {
        k: v.tolist() for k, v in alone.arrays.items()
    }


def test_training_needs_two_sequences() -> None:
    with pytest.raises(DataError, match="port-share needs two training sequences"):
        ports.fit("port-share", drawn(3), np.array([TRAIN, 3, 3], np.int8), 0)
