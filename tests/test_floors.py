"""The port floor against scikit-learn's TF-IDF and hand-computed rows; random vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from rayscan.errors import DataError, SchemaError
from rayscan.evaluation.blockwise import nearest, pair_statistics
from rayscan.methods.floors import port_vectors, random_unit
from rayscan.schema import MISSING

TCP, UDP = 6, 17


def sequences(*flows: list[tuple[int, int]] | None) -> pa.Table:
    """A table of sequences given as lists of (proto, port)."""
    columns = {
        "proto": pa.array([f and [p for p, _ in f] for f in flows], pa.list_(pa.int16())),
        "dst_port": pa.array([f and [p for _, p in f] for f in flows], pa.list_(pa.int32())),
    }
    return pa.table(columns)


def test_two_sequences_by_hand() -> None:
    """Both have 23/tcp (idf ln(3/3) + 1 = 1), one has 53/udp twice (idf ln(3/2) + 1)."""
    found = port_vectors(sequences([(TCP, 23)], [(UDP, 53), (TCP, 23), (UDP, 53)]))
    assert found.dtype == np.float32 and found.shape == (2, 2)
    other = 2 * (np.log(1.5) + 1)
    expected = [[1, 0], np.array([1, other]) / np.hypot(1, other)]
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-6)


def test_it_is_scikit_learns_tfidf() -> None:
    rng = np.random.default_rng(0)
    flows = [
        [(int(p), int(q)) for p, q in zip(rng.choice([TCP, UDP], n), rng.geometric(0.1, n), strict=True)]
        for n in rng.integers(1, 30, 40)
    ]
    words = [" ".join(f"{p}x{q}" for p, q in f) for f in flows]
    expected = TfidfVectorizer(token_pattern=r"\S+").fit_transform(words)
    found = port_vectors(sequences(*flows))
    np.testing.assert_allclose((found @ found.T).toarray(), (expected @ expected.T).toarray(), atol=1e-6)


def test_port_and_protocol_both_count() -> None:
    found = port_vectors(sequences([(TCP, 53)], [(UDP, 53)], [(TCP, 53)])).toarray()
    np.testing.assert_allclose(found @ found.T, [[1, 0, 1], [0, 1, 0], [1, 0, 1]], atol=1e-6)


def test_unrecorded_ports_are_a_port() -> None:
    found = port_vectors(
        sequences([(TCP, MISSING)], [(TCP, MISSING)], [(TCP, 65_535)], [(5, 65_535)])
    ).toarray()
    np.testing.assert_allclose(
        found @ found.T, np.eye(4)[[0, 0, 2, 3]] @ np.eye(4)[[0, 0, 2, 3]].T, atol=1e-6
    )


def test_sequences_without_flows_are_like_nothing() -> None:
    found = port_vectors(sequences([], [(TCP, 1)], None))
    np.testing.assert_allclose(found.toarray().ravel(), [0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("flows", [(), ([], [])])
def test_nothing_at_all(flows: tuple[list[tuple[int, int]], ...]) -> None:
    found = port_vectors(sequences(*flows))
    assert found.shape == (len(flows), 0)
    src = np.arange(len(flows))
    assert pair_statistics(found, src).n_different == max(len(flows) - 1, 0)
    assert len(nearest(found, src).index) == len(flows)


def test_chunks_and_slices() -> None:
    table = sequences([(TCP, 23)], [(TCP, 80), (TCP, 23)], [(UDP, 53)], [(TCP, 23)])
    parts = pa.concat_tables([table.slice(1, 2), table.slice(3)])
    np.testing.assert_array_equal(
        port_vectors(parts).toarray(), port_vectors(table.take([1, 2, 3])).toarray()
    )


def test_tables_that_are_not_sequences() -> None:
    with pytest.raises(SchemaError, match="dst_port"):
        port_vectors(pa.table({"proto": pa.array([[6]], pa.list_(pa.int16())), "dst_port": [80]}))
    uneven = {
        "proto": pa.array([[6]], pa.list_(pa.int16())),
        "dst_port": pa.array([[1, 2]], pa.list_(pa.int32())),
    }
    with pytest.raises(DataError, match="differ in length"):
        port_vectors(pa.table(uneven))


def test_random_directions() -> None:
    found = random_unit(2000, 16, seed=3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found, random_unit(2000, 16, seed=3))
    assert np.abs(found.mean(axis=0)).max() < 0.03
    counts = pair_statistics(found, np.arange(2000) // 4)
    assert counts.auroc() == pytest.approx(0.5, abs=0.02)
    assert random_unit(0, 4, 0).shape == (0, 4)


@pytest.mark.data
def test_floor_on_real_flows(real_data: Path) -> None:
    """Sequences of 16 flows of sources with at least 32, 20 of each: a loose bound on a known figure."""
    flows = pl.read_parquet(
        real_data / "flows" / "marx.parquet", columns=["ts", "src_ip", "dst_port", "proto"]
    )
    cut = (
        flows.sort("src_ip", "ts", maintain_order=True)
        .with_columns(at=pl.int_range(pl.len()).over("src_ip"), n=pl.len().over("src_ip"))
        .filter((pl.col("n") >= 32) & (pl.col("at") < 20 * 16))
        .group_by("src_ip", pl.col("at") // 16, maintain_order=True)
        .agg("proto", "dst_port")
        .filter(pl.col("proto").list.len() == 16)
    )
    lists = pl.List(pl.Int16), pl.List(pl.Int32)
    table = cut.with_columns(pl.col("proto").cast(lists[0]), pl.col("dst_port").cast(lists[1])).to_arrow()
    kinds = pa.schema([("proto", pa.list_(pa.int16())), ("dst_port", pa.list_(pa.int32()))])
    src = cut["src_ip"].to_numpy().astype(np.int64)
    counts = pair_statistics(port_vectors(table.select(kinds.names).cast(kinds)), src)
    assert 1300 < len(np.unique(src)) < 1600
    assert 0.84 < counts.auroc() < 0.96
