"""`rayscan cluster FILE`: anybody's vectors, in the layouts that people have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from rayscan import vectors
from rayscan.cli import main
from rayscan.clustering import canonical, objective, solve, sweep
from rayscan.clustering.runs import RUN, runs
from rayscan.errors import ConfigError
from rayscan.vectors import grid, partitions, read


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
        pa.list_(pa.float32(), 16), pa.list_(pa.float16()), pa.list_(pa.float64(), 16),
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


@pytest.mark.parametrize("kind", [">f8", "f2", "f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_matrices_of_every_kind(points: np.ndarray, kind: str, order: str, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array(points, np.dtype(kind), order=order))  # type: ignore[call-overload]
    (summary,) = json.loads(rayscan(tmp_path / "v.npy", "--threshold", 0.5, "--json").stdout)
    assert summary["largest"] == [20, 12, 5]


def test_rows_stay_in_order_over_row_groups(points: np.ndarray, tmp_path: Path) -> None:
    """Several row groups, batches and chunks; and a tensor column, as other libraries write it."""
    many = np.tile(points, (3000, 1)).astype(np.float32)
    columns = {"number": np.arange(len(many)), "vector": pa.FixedShapeTensorArray.from_numpy_ndarray(many)}
    pq.write_table(pa.table(columns), tmp_path / "v", row_group_size=9999)
    found = read(tmp_path / "v", normalise=True)
    assert np.allclose(found.values, many, atol=1e-6)
    assert found.columns is not None
    assert np.array_equal(found.columns["number"].to_numpy(), np.arange(len(many)))


@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_any_rows(rows: int, tmp_path: Path) -> None:
    vectors = pa.array([[0.6, 0.8]] * rows, pa.list_(pa.float32()))
    pq.write_table(pa.table({"vector": vectors}), tmp_path / "v")
    for more in (["--threshold", 0.5], ["--sweep", "0:1:0.5"]):
        result = rayscan(tmp_path / "v", *more, "--out", tmp_path / "labels", "--json")
        assert result.exit_code == 0
        assert {row["clusters"] for row in json.loads(result.stdout)} == {rows}
        assert pq.read_table(tmp_path / "labels").num_rows == rows


def test_columns_in_the_way_of_labels_are_named(points: np.ndarray, tmp_path: Path) -> None:
    old = table(points, pa.list_(pa.float32())).append_column("cluster", pa.array(["old"] * 37))
    pq.write_table(old, tmp_path / "v")
    result = rayscan(tmp_path / "v", "--threshold", 0.5, "--normalise", "--out", tmp_path / "labels")
    assert "column `cluster` of" in result.stderr
    assert "is left out" in result.stderr
    assert set(pq.read_table(tmp_path / "labels")["cluster"].to_pylist()) == {0, 1, 2}


@pytest.mark.parametrize("thresholds", [[0.3], [0.1, 0.3]])
def test_seed_and_time_are_those_of_the_search(thresholds: list[float]) -> None:
    rng = np.random.default_rng(1)
    points = rng.standard_normal((2200, 8)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    found = list(partitions(points, thresholds, seed=5))
    one = [solve(points, t, seed=5) for t in thresholds] if len(thresholds) == 1 else None
    expected = one or list(sweep(points, thresholds, seed=5))
    assert all(np.array_equal(a.labels, b) for a, b in zip(found, expected, strict=True))
    assert all(partition.seconds > 1e-3 for partition in found)


def test_many_vectors_are_solved_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    points = rng.standard_normal((25, 12))[rng.integers(25, size=600)] + 0.5 * rng.standard_normal((600, 12))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    (whole,) = partitions(points, [0.4])
    monkeypatch.setattr(vectors, "LARGE", 500)
    monkeypatch.setattr(vectors, "_BATCH", 250)
    told: list[str] = []
    (found,) = partitions(points, [0.4], note=told.append)
    assert told[:4] == [f"first solutions: {i} of 3 blocks" for i in (1, 2, 3)] + ["pass 1: 1 of 3 blocks"]
    assert np.array_equal(found.labels, canonical(found.labels))
    assert found.objective == pytest.approx(objective(points, found.labels, 0.4))
    assert found.objective >= 0.98 * whole.objective
    ordered = np.argsort(whole.labels, kind="stable")  # sorted files must not make blocks of similar rows
    (again,) = partitions(points[ordered], [0.4])
    assert np.array_equal(again.labels, canonical(found.labels[ordered]))


def test_columns_of_one_name_are_refused_before_any_work(points: np.ndarray, tmp_path: Path) -> None:
    rows = table(points, pa.list_(pa.float32())).append_column("src", pa.array(np.arange(len(points))))
    pq.write_table(rows, tmp_path / "v.parquet")
    result = rayscan(tmp_path / "v.parquet", "--threshold", 0.4)
    assert result.exit_code == 1
    assert "has more than one column `src`; rename one" in result.stderr


def test_auto_learns_from_a_column(points: np.ndarray, tmp_path: Path) -> None:
    pq.write_table(table(points, pa.list_(pa.float32())), tmp_path / "v.parquet")
    result = rayscan(tmp_path / "v.parquet", "--json")
    assert "calibrated on column src" in result.stderr
    (summary,) = json.loads(result.stdout)
    assert 0.1 < summary["threshold"] < 0.95
    assert summary["clusters"] == 3


@pytest.mark.parametrize(
    ("group", "code", "message"),
    [
        ("nobody", 2, "there is no column `nobody`"),
        ("name", 1, "needs rows that share a value of column `name`"),
        ("all", 1, "and rows that do not"),
        ("none", 1, "and rows that do not"),
        ("random", 1, "are not more alike than others"),
        ("nested", 2, "is a column of struct<a: int64>"),
    ],
)
def test_auto_says_why_not(points: np.ndarray, group: str, code: int, message: str, tmp_path: Path) -> None:
    given = table(points, pa.list_(pa.float32()))
    by_axis = np.argsort(given["src"].to_numpy(), kind="stable")
    shared = np.empty(37, np.int64)
    shared[by_axis] = np.arange(37) % 12  # hardly any two of a group lie in one bundle
    more = {"all": ["x"] * 37, "none": pa.nulls(37, pa.int64()), "random": shared, "nested": [{"a": 1}] * 37}
    for name, values in more.items():
        given = given.append_column(name, pa.array(values))
    pq.write_table(given, tmp_path / "v")
    result = rayscan(tmp_path / "v", "--normalise", "--group", group)
    assert result.exit_code == code
    assert message in result.stderr


NAN = float("nan")


def parquet(vectors: object) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table({"vector": vectors}), path)


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda p: None, 2, "is not there"),
        (lambda p: p.mkdir(), 2, "is a folder"),
        (lambda p: p.write_text("a,b\n"), 1, "neither Parquet nor .npy"),
        (lambda p: p.write_bytes(b"PAR1 and nothing"), 1, "cannot be read"),
        (lambda p: p.write_bytes(b"\x93NUMPY"), 1, "cannot be read"),
        (lambda p: pq.write_table(pa.table({"x": [1]}), p), 1, "has no column `vector`; it has x"),
        (parquet([1]), 1, "is int64, not a list of floats"),
        (parquet([[1.0], None]), 1, "row 1 has no vector"),
        (parquet([[1.0], [1.0, 2.0]]), 1, "row 1 has 2 numbers"),
        (parquet([[1.0, 0.0], [0.0, NAN]]), 1, "v: embedding of row 1 is not finite"),
        (parquet([[1.0, 0.0], [None, 1.0]]), 1, "row 1 is not finite"),
        (parquet([[1e300, 0.0]]), 1, "row 0 is not finite"),
        (parquet([[3.0, 0.0]]), 1, "has length 3, not 1: normalise it if"),
        (parquet([[1.0, 0.0], [0.0, 0.0]]), 1, "row 1 has length 0"),
        (lambda p: np.save(p.open("wb"), np.ones(3)), 1, "not a matrix of floats"),
        (lambda p: np.save(p.open("wb"), np.ones((3, 2), int)), 1, "int64 (3, 2), not a matrix of floats"),
        (lambda p: np.save(p.open("wb"), np.array([{}]), allow_pickle=True), 1, "Python objects"),
    ],
)  # fmt: skip
def test_bad_files(make: Callable[[Path], None], code: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "v"
    make(path)
    result = rayscan(path, "--threshold", 0.5)
    assert result.exit_code == code
    assert message in result.stderr


def test_zero_vectors_cannot_be_normalised(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([[3.0, 4.0], [0.0, 0.0]]))
    result = rayscan(tmp_path / "v.npy", "--threshold", 0.5, "--normalise")
    assert result.exit_code == 1
    assert "row 1 has length 0 and cannot be normalised" in result.stderr


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("v.npy", "is the file of the vectors itself"),
        (".", "is a folder"),
        ("no/labels", "there is no folder"),
    ],
)
def test_where_labels_cannot_go_is_said_before_the_work(out: str, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.full((1, 4), np.nan))  # reading it would be another error
    result = rayscan(tmp_path / "v.npy", "--threshold", 0.5, "--out", tmp_path / out)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_failed_write_leaves_nothing(points: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", points)
    name = "x" * 250  # long enough that only the temporary name is too long
    result = rayscan(tmp_path / "v.npy", "--threshold", 0.5, "--normalise", "--out", tmp_path / name)
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["v.npy", "--threshold", "x"], "--threshold takes a similarity"),
        (["v.npy", "--threshold", "0:1:0.1"], "--threshold takes a similarity"),
        (["v.npy", "--threshold", "nan"], "--threshold takes a similarity"),
        (["v.npy", "--threshold", 0.4, "--sweep", "0:1:0.1"], "--threshold and --sweep exclude each other"),
        (["v.npy", "--set", "cluster.seed=1"], "--set is for a workspace"),
        (["v.npy", "--dry-run"], "--dry-run is for a workspace"),
        (["v.npy", "--threshold", 0.4, "--address", "auto"], "--address is for --sweep"),
        (["v.npy", "--threshold", 0.4, "--group", "src"], "--group is for --threshold auto"),
        (["-w", "ws", "--threshold", 0.4], "--threshold is for VECTORS"),
        (["-w", "ws", "--out", "labels"], "--out is for VECTORS"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words: list[object], message: str) -> None:
    result = rayscan(*words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_neither_file_nor_workspace() -> None:
    result = rayscan("--threshold", 0.5)
    assert result.exit_code == 2
    assert "give a file of vectors, or a workspace" in result.stderr


def test_grids() -> None:
    assert grid("0:1:0.01") == [round(i / 100, 2) for i in range(100)]
    assert grid("0.2,0.4") == [0.2, 0.4]
    assert grid("0.3") == [0.3]
    assert grid("0.6,0.2,0.6") == grid("0.6:0:-0.4") == [0.2, 0.6]
    for bad in ("0:1", "a", "0:1:0", "0.1,nan", "0:inf:1", ""):
        with pytest.raises(ConfigError, match="start:stop:step"):
            grid(bad)
    for none in ("1:0:0.1", "0:1:1e-9"):
        with pytest.raises(ConfigError, match="it takes 1 to"):
            grid(none)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=300))
def test_runs_are_even(thresholds: list[float]) -> None:
    found = runs(thresholds)
    assert [threshold for run in found for threshold in run] == thresholds
    assert max(map(len, found)) <= RUN
    assert max(map(len, found)) - min(map(len, found)) <= 1
