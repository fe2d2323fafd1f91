"""`rayscan cluster FILE`: anybody's vectors, in the layouts that people have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from rayscan.cli import main
from rayscan.clustering import objective, solve, sweep
from rayscan.errors import ConfigError
from rayscan.vectors import grid, partitions


def rayscan(*words: object) -> Result:
    return CliRunner().invoke(main, ["cluster", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def points() -> np.ndarray:
    """Three tight bundles of 20, 12 and 5 directions, shuffled."""
    rng = np.random.default_rng(0)
    centres = np.eye(16)[[0] * 20 + [5] * 12 + [9] * 5]
    found = centres + 0.05 * rng.standard_normal(centres.shape)
    return (found / np.linalg.norm(found, axis=1, keepdims=True))[rng.permutation(37)]


def table(points: np.ndarray, kind: pa.DataType) -> pa.Table:
    names = [f"host {i}" for i in range(len(points))]
    src = points.argmax(axis=1)
    return pa.table(
        {"name": names, "src": src, "vector": pa.array(points.tolist(), pa.list_(pa.float64())).cast(kind)}
    )


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()), pa.list_(pa.float64()), pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 16), pa.list_(pa.float16()),
    ],
    ids=str,
)  # fmt: skip
def test_parquet_of_every_kind(points: np.ndarray, kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(table(points, kind), tmp_path / "v.parquet")
    out = tmp_path / "labels.parquet"
    words = [tmp_path / "v.parquet", "--threshold", 0.5, "--out", out, "--json", "--normalise"]
    (summary,) = json.loads(rayscan(*words).stdout)
    assert (summary["clusters"], summary["largest"], summary["points"]) == (3, [20, 12, 5], 37)
    labels = pq.read_table(out)
    assert labels.column_names == ["name", "src", "cluster"]
    assert len(set(zip(labels["src"].to_pylist(), labels["cluster"].to_pylist(), strict=True))) == 3
    assert summary["objective"] == pytest.approx(
        objective(points.astype(np.float32), labels["cluster"].to_numpy(), 0.5), rel=1e-3
    )


def test_matrix_and_sweep(points: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", points)
    out = tmp_path / "labels.parquet"
    result = rayscan(tmp_path / "v.npy", "--sweep", "0:1:0.25", "--out", out)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 5
    names = ["row", "cluster@0", "cluster@0.25", "cluster@0.5", "cluster@0.75"]
    assert pq.read_table(out).column_names == names


@pytest.mark.parametrize("thresholds", [[0.3], [0.1, 0.3]])
def test_seed_and_time_are_those_of_the_search(thresholds: list[float]) -> None:
    rng = np.random.default_rng(1)
    points = rng.standard_normal((3000, 8)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for seed in (0, 5):
        found = list(partitions(points, thresholds, seed))
        one = [solve(points, t, seed=seed) for t in thresholds] if len(thresholds) == 1 else None
        expected = one or list(sweep(points, thresholds, seed=seed))
        assert all(np.array_equal(a.labels, b) for a, b in zip(found, expected, strict=True))
        assert all(partition.seconds > 1e-3 for partition in found)


def test_auto_learns_from_a_column(points: np.ndarray, tmp_path: Path) -> None:
    pq.write_table(table(points, pa.list_(pa.float32())), tmp_path / "v.parquet")
    result = rayscan(tmp_path / "v.parquet", "--json")
    assert "calibrated on column src" in result.stderr
    (summary,) = json.loads(result.stdout)
    assert 0.1 < summary["threshold"] < 0.95
    assert summary["clusters"] == 3
    missing = rayscan(tmp_path / "v.parquet", "--group", "nobody")
    assert missing.exit_code == 2
    assert "there is no column `nobody`" in missing.stderr


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda p: None, 2, "is not there"),
        (lambda p: p.write_text("a,b\n"), 1, "neither Parquet nor .npy"),
        (lambda p: pq.write_table(pa.table({"x": [1]}), p), 1, "has no column `vector`; it has x"),
        (lambda p: pq.write_table(pa.table({"vector": [1]}), p), 1, "is int64, not a list of floats"),
        (lambda p: pq.write_table(pa.table({"vector": [[1.0], None]}), p), 1, "row 1 has no vector"),
        (lambda p: pq.write_table(pa.table({"vector": [[1.0], [1.0, 2.0]]}), p), 1, "row 1 has 2 numbers"),
        (lambda p: pq.write_table(pa.table({"vector": [[1.0, 0.0], [0.0, float("nan")]]}), p), 1, "finite"),
        (lambda p: pq.write_table(pa.table({"vector": [[3.0, 0.0]]}), p), 1, "has length 3, not 1"),
        (lambda p: np.save(p.open("wb"), np.ones(3)), 1, "not a matrix of floats"),
        (lambda p: np.save(p.open("wb"), np.array([{}]), allow_pickle=True), 1, "cannot be read as a matrix"),
    ],
)  # fmt: skip
def test_bad_files(make: object, code: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "v"
    make(path)  # type: ignore[operator]
    result = rayscan(path, "--threshold", 0.5)
    assert result.exit_code == code
    assert message in result.stderr


def test_neither_file_nor_workspace() -> None:
    result = rayscan("--threshold", 0.5)
    assert result.exit_code == 2
    assert "give a file of vectors, or a workspace" in result.stderr


def test_grids() -> None:
    assert grid("0:1:0.01") == [round(i / 100, 2) for i in range(100)]
    assert grid("0.2,0.4") == [0.2, 0.4]
    assert grid("0.3") == [0.3]
    for bad in ("0:1", "a", "0:1:0"):
        with pytest.raises(ConfigError, match="start:stop:step"):
            grid(bad)
