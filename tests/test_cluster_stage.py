"""The cluster stage on real Ray: killed workers, damaged input, any number of workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayscan import schema
from rayscan.clustering import canonical, objective, solve
from rayscan.config import RunConfig, load
from rayscan.errors import ConfigError, DataError
from rayscan.planning import Model, Unit, calibration_version
from rayscan.stages import cluster
from rayscan.stages.campaigns import _sums
from rayscan.tables import CommitInfo, File, Table, Workspace

pytestmark = pytest.mark.ray
MODEL = Model("m", "w", {})
PERIODS = ("2024-01", "2024-02", "2024-03")
ROWS = 300
KEYS = ["period", "sequence_id"]


def settings(*sets: str) -> RunConfig:
    return load(sets=["cluster.threshold=0.4", "cluster.block_sequences=80", *sets], env={})


def fresh(folder: Path) -> Workspace:
    return Workspace.open(str(folder / "ws"), settings().ingest)


def points(seed: int, n: int = ROWS) -> np.ndarray:
    """Unit vectors around 30 centres, some far from theirs."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((30, 12))
    found = centres[rng.integers(30, size=n)] + rng.standard_normal((n, 12)) * rng.uniform(0.2, 0.9, (n, 1))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def embed(workspace: Workspace, periods: Sequence[str] = PERIODS) -> list[Unit]:
    """Embeddings of each period in two files, and the units that cluster them."""
    units = []
    for i, period in enumerate(periods):
        vectors = points(i)
        files = []
        for bucket, rows in enumerate(np.array_split(np.arange(ROWS), 2)):
            columns = {
                "sequence_id": 1000 * i + rows,
                "src": rows % 50,
                "start": pa.array(np.zeros(len(rows), np.int64)).cast(schema.TIME),
                "vector": pa.array(vectors[rows].tolist(), pa.list_(pa.float32())),
            }
            key = {"model": "m", "period": period, "bucket": bucket}
            files.append(
                workspace.table("embeddings").write(pa.table(columns, schema=schema.EMBEDDINGS), key)
            )
        units.append(Unit({"run": "main", "period": period}, tuple(files), i + 1, "due"))
    return units


def run(workspace: Workspace, units: list[Unit], config: RunConfig | None = None) -> pl.DataFrame:
    cluster.run(workspace, config or settings(), MODEL, units, CommitInfo("r", "c"))
    return committed(workspace)


def committed(workspace: Workspace) -> pl.DataFrame:
    found = pl.from_arrow(Workspace(workspace.uri).table("clusters").read())
    assert isinstance(found, pl.DataFrame)
    return found.sort(KEYS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> pl.DataFrame:
    workspace = fresh(tmp_path_factory.mktemp("undisturbed"))
    return run(workspace, embed(workspace))


def test_every_sequence_is_where_solve_would_put_it(undisturbed: pl.DataFrame) -> None:
    assert undisturbed.height == len(PERIODS) * ROWS
    assert undisturbed.select(KEYS).is_unique().all()
    for i, (_, part) in enumerate(undisturbed.group_by("period", maintain_order=True)):
        labels = part["cluster"].to_numpy()
        assert np.array_equal(canonical(labels), labels)
        vectors = points(i)
        alone = objective(vectors, solve(vectors, 0.4), 0.4)
        assert objective(vectors, labels, 0.4) >= 0.97 * alone


@pytest.mark.parametrize("when", ["reading at first", "reading again", "before writing", "after writing"])
def test_a_killed_worker_changes_nothing(undisturbed: pl.DataFrame, tmp_path: Path, when: str) -> None:
    """The process of a task dies for real, once; a retry does its work again."""
    driver, marker, reads = os.getpid(), tmp_path / "killed", tmp_path / "reads"
    reads.mkdir()

    def die() -> None:
        if os.getpid() != driver and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    class Deadly(Workspace):
        """A workspace in which one task dies."""

        def table(self, name: str) -> Table:
            if name == "embeddings":
                first = len(list(reads.iterdir())) < 4
                (reads / os.urandom(8).hex()).touch()
                if when == ("reading at first" if first else "reading again"):
                    die()
            return DeadlyTable(self, name)

    class DeadlyTable(Table):
        def write(self, data: pa.Table, key: object, prefix: str = "part") -> File:
            if when == "before writing":
                die()
            file = super().write(data, key, prefix)  # type: ignore[arg-type]
            if when == "after writing":
                die()
            return file

    workspace = fresh(tmp_path)
    found = run(Deadly(workspace.uri), embed(workspace))
    assert marker.exists(), "nothing was killed"
    assert found.equals(undisturbed)


@pytest.mark.parametrize("cpus", [2, 4])
def test_the_number_of_workers_changes_nothing(undisturbed: pl.DataFrame, tmp_path: Path, cpus: int) -> None:
    """Of four CPUs: two tasks at a time, or one, where there were four."""
    workspace = fresh(tmp_path)
    found = run(workspace, embed(workspace), settings(f"resources.cluster_cpus={cpus}"))
    assert found.equals(undisturbed)


def test_rounds_that_were_cut_short_are_told(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = fresh(tmp_path)
    run(workspace, embed(workspace, PERIODS[:1]), settings("cluster.max_rounds=0"))
    told = "2024-01 stopped after 0 rounds; none has compared the rows with all clusters (cluster.max_rounds)"
    assert told in capsys.readouterr().err


def test_sums_of_campaigns_leave_out_what_was_embedded_later(tmp_path: Path) -> None:
    workspace = fresh(tmp_path)
    (unit,) = embed(workspace, PERIODS[:1])
    ids, labels = np.arange(0, ROWS - 50, 2), np.zeros(ROWS // 2 - 25, np.int64)
    sums, sizes = _sums(workspace, unit.files, ids, labels, 2)
    assert sizes.tolist() == [len(ids), 0]
    assert sums[0] == pytest.approx(points(0)[ids].sum(0), rel=1e-5)


def test_a_calibrated_threshold_rests_on_the_sample_alone() -> None:
    first = calibration_version(settings(), MODEL)
    assert calibration_version(settings("evaluate.bootstrap=7"), MODEL) == first
    assert calibration_version(settings("evaluate.max_sequences=77"), MODEL) != first


def test_more_cpus_than_there_are_is_an_error_and_no_endless_wait(ray_session: None, tmp_path: Path) -> None:
    workspace = fresh(tmp_path)
    with pytest.raises(ConfigError, match="do not fit"):
        run(workspace, embed(workspace, PERIODS[:1]), settings("resources.cluster_cpus=64"))


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def not_finite(file: Path) -> None:
    rows = pq.read_table(file)
    vectors = rows["vector"].to_pylist()
    vectors[120][3] = float("nan")
    pq.write_table(rows.set_column(3, "vector", pa.array(vectors, pa.list_(pa.float32()))), file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damaged, "is damaged"), (not_finite, "rows from 80 on: embedding of row 40 is not finite")],
)
def test_poison_is_named_and_costs_only_its_period(
    undisturbed: pl.DataFrame, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    workspace = fresh(tmp_path)
    units = embed(workspace)
    poisoned = units[1].files[1]
    damage(tmp_path / "ws" / "embeddings" / poisoned.path)
    with pytest.raises(DataError) as raised:
        run(workspace, units)
    assert message in str(raised.value)
    assert poisoned.path in str(raised.value)
    assert "period=2024-02" in poisoned.path
    assert committed(workspace).equals(undisturbed.filter(pl.col("period") != "2024-02"))
