"""Ingest: sharding, content hashes, corrected captures, and files that nobody can read."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayscan import planning
from rayscan.config import IngestConfig, RunConfig, load
from rayscan.errors import ConfigError
from rayscan.keys import bucket_of
from rayscan.planning import CaptureFile, capture_units, find_captures
from rayscan.stages.ingest import Counts, _Ledger, ingest_file
from rayscan.tables import CommitInfo, Workspace

INFO = CommitInfo("run", "config")


def capture(path: Path, n: int = 1000, seed: int = 0, **columns: Any) -> pa.Table:
    rng = np.random.default_rng(seed)
    table = pa.table(
        {
            "ts": pa.array(
                np.sort(rng.integers(1_704_067_200, 1_709_251_200, n)) * 1_000_000, pa.timestamp("us", "UTC")
            ),
            "src_ip": pa.array(rng.integers(2**24, 2**24 + 50, n), pa.uint32()),
            "dst_ip": pa.array(rng.integers(2**30, 2**30 + 256, n), pa.uint32()),
            "dst_port": pa.array(rng.choice([22, 23, 443], n), pa.uint16()),
            "proto": pa.array(np.full(n, 6), pa.uint8()),
            **columns,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return table


class Site:
    """A workspace and a folder of captures, ingested in this process: the tasks' and driver's own code."""

    def __init__(self, folder: Path, *sets: str) -> None:
        self.captures = folder / "captures"
        self.captures.mkdir()
        everything = [f"captures.paths={self.captures}", "ingest.n_buckets=3", *sets]
        self.config: RunConfig = load(sets=everything, env={})
        self.workspace = Workspace.open(folder / "ws", self.config.ingest)

    def due(self) -> list[CaptureFile]:
        return [file for file in capture_units(self.workspace, self.config) if file.state != "done"]

    def ingest(self) -> Counts:
        counts = Counts()
        results = [ingest_file(self.workspace, file, self.config) for file in self.due()]
        ledger = _Ledger(self.workspace, planning.ingest_version(self.config), INFO)
        ledger.commit(results, counts)
        return counts

    def flows(self) -> pl.DataFrame:
        return pl.from_arrow(self.workspace.table("flows").read())  # type: ignore[return-value]

    def rejects(self) -> dict[tuple[str, str], int]:
        rows = self.workspace.table("rejects").read().to_pylist()
        return {(Path(row["path"]).name, row["reason"]): row["count"] for row in rows}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_every_row_lies_in_its_period_and_bucket(site: Site) -> None:
    table = pl.from_arrow(capture(site.captures / "a.parquet"))
    assert isinstance(table, pl.DataFrame)
    assert site.ingest().flows == 1000
    flows = site.flows()
    assert flows.height == 1000
    assert set(flows["period"]) == {"2024-01", "2024-02"}
    assert (flows["ts"].dt.strftime("%Y-%m") == flows["period"]).all()
    assert (pl.Series(bucket_of(flows["src"].to_numpy(), 3)) == flows["bucket"]).all()
    keys = ["ts", "src", "dst", "dst_port"]
    expected = table.rename({"src_ip": "src", "dst_ip": "dst"}).select(pl.col(keys).cast(pl.Int64))
    assert flows.select(pl.col(keys).cast(pl.Int64)).sort(keys).equals(expected.sort(keys))
    assert site.due() == []


def test_small_batches_change_nothing_but_the_number_of_files(tmp_path: Path) -> None:
    found = []
    for name, rows in (("small", 64), ("large", 100_000)):
        (tmp_path / name).mkdir()
        site = Site(tmp_path / name, f"ingest.batch_rows={rows}")
        capture(site.captures / "a.parquet", 2000)
        site.ingest()
        found.append(site.flows())
        files = site.workspace.table("flows").files()
        assert (len(files) == 6) == (name == "large")
    assert found[0].equals(found[1])  # order within a bucket too


def test_the_same_content_counts_once(site: Site) -> None:
    capture(site.captures / "a.parquet", seed=1)
    capture(site.captures / "sub" / "b.parquet", seed=1)
    counts = site.ingest()
    assert (counts.captures, counts.same, counts.flows) == (2, 1, 1000)
    assert site.flows().height == 1000
    assert site.due() == []
    capture(site.captures / "c.parquet", seed=1)  # and later
    counts = site.ingest()
    assert (counts.captures, counts.same, counts.flows) == (1, 1, 0)
    assert site.flows().height == 1000
    formats = Counter(row["format"][:12] for row in site.workspace.table("captures").read().to_pylist())
    assert formats == {"parquet": 1, "same content": 2}


def test_a_corrected_capture_takes_the_place_of_the_first(site: Site) -> None:
    capture(site.captures / "a.parquet", seed=1)
    capture(site.captures / "b.parquet", seed=2)
    site.ingest()
    capture(site.captures / "a.parquet", 700, seed=3)
    assert [file.state for file in site.due()] == ["stale"]
    site.ingest()
    assert site.flows().height == 1700
    capture(site.captures / "a.parquet", seed=1)  # and back
    site.ingest()
    assert site.flows().height == 2000
    assert site.due() == []


def test_content_that_another_path_still_has_stays(site: Site) -> None:
    capture(site.captures / "a.parquet", seed=1)
    capture(site.captures / "b.parquet", seed=1)
    site.ingest()
    capture(site.captures / "a.parquet", 500, seed=2)
    site.ingest()
    assert site.flows().height == 1500


def test_the_same_content_read_with_other_settings_counts_once(site: Site) -> None:
    for name in ("a", "b"):
        capture(site.captures / f"{name}.parquet", 400, seed=1)
    site.ingest()
    paths = [f"captures.paths={site.captures}", "ingest.n_buckets=3", "captures.sensor=north"]
    site.config = load(sets=paths, env={})
    counts = site.ingest()
    assert (counts.captures, counts.same, counts.flows) == (2, 1, 400)
    assert site.flows()["sensor"].to_list() == ["north"] * 400
    assert sorted(site.workspace.table("captures").read()["flows"].to_pylist()) == [0, 400]


def test_a_kill_between_the_commits_is_repaired(site: Site) -> None:
    """Flows are committed, the books are not: the capture is read again and no row comes twice."""
    capture(site.captures / "a.parquet", 500)
    results = [ingest_file(site.workspace, file, site.config) for file in site.due()]
    ledger = _Ledger(site.workspace, planning.ingest_version(site.config), INFO)
    ledger._commit_flows(results)
    assert [file.state for file in site.due()] == ["due"]
    assert site.ingest().flows == 500
    assert site.flows().height == 500
    assert site.workspace.table("captures").read()["flows"].to_pylist() == [500]
    assert site.due() == []


def test_other_settings_read_captures_again(site: Site) -> None:
    capture(site.captures / "a.parquet", 300, other=pa.array([80] * 300))
    site.ingest()
    site.config = load(
        sets=[f"captures.paths={site.captures}", "ingest.n_buckets=3", "captures.columns={dst_port: other}"],
        env={},
    )
    assert [file.state for file in site.due()] == ["stale"]
    site.ingest()
    assert site.flows()["dst_port"].to_list() == [80] * 300


def test_bad_files_cost_no_good_row(site: Site) -> None:
    for number in range(3):
        capture(site.captures / f"good{number}.parquet", seed=number)
    whole = (site.captures / "good0.parquet").read_bytes()
    (site.captures / "truncated.parquet").write_bytes(whole[:-100])
    (site.captures / "empty.parquet").write_bytes(b"")
    (site.captures / "noise.bin").write_bytes(os.urandom(1000) + b"\0")
    pq.write_table(pa.table({"x": [1]}), site.captures / "stranger.parquet")
    (site.captures / "secret.csv").write_text("")
    counts = site.ingest()
    assert counts.flows == 3000
    assert counts.rejected == 5
    assert site.flows().height == 3000
    rejects = site.rejects()
    assert sorted({name for name, _ in rejects}) == [
        "empty.parquet", "noise.bin", "secret.csv", "stranger.parquet", "truncated.parquet",
    ]  # fmt: skip
    assert set(rejects.values()) == {1}
    assert rejects["empty.parquet", "empty file"] == 1
    assert site.due() == []  # bad files are done too, until they change


def test_an_unreadable_file_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(site.captures / "a.parquet", 100)
    due = site.due()
    (site.captures / "a.parquet").rename(site.captures / ".hidden")  # gone between listing and reading
    result = ingest_file(site.workspace, due[0], site.config)
    assert not result.finished
    ledger = _Ledger(site.workspace, planning.ingest_version(site.config), INFO)
    ledger.commit([result], Counts())
    assert "cannot be read" in next(iter(site.rejects()))[1]
    (site.captures / ".hidden").rename(site.captures / "a.parquet")
    assert site.ingest().flows == 100
    assert site.rejects() == {}


def test_paths(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.csv", ".hidden", "_SUCCESS", "sub/c.parquet", "ws/flows/d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")

    def names(*paths: str) -> list[str]:
        settings = load(sets=[f"captures.paths={list(paths)}"], env={}).captures
        found = find_captures(settings, str(tmp_path / "ws"))
        return [os.path.relpath(file.path, tmp_path) for file in found]

    assert names(str(tmp_path)) == ["a.parquet", "b.csv", "sub/c.parquet"]
    assert names(f"{tmp_path}/*.parquet") == ["a.parquet", "sub/c.parquet"]
    assert names(f"{tmp_path}/b.csv", f"{tmp_path}/b.csv") == ["b.csv"]
    with pytest.raises(ConfigError, match="nowhere is not there"):
        names(f"{tmp_path}/nowhere")
    with pytest.raises(ConfigError, match="holds no files"):
        names(f"{tmp_path}/ws")
    with pytest.raises(ConfigError, match=r"captures.paths is empty"):
        find_captures(load(env={}).captures, "")


def test_period_all_and_day(tmp_path: Path) -> None:
    for period, expected in (("all", {"all"}), ("day", None)):
        (tmp_path / period).mkdir()
        site = Site(tmp_path / period, f"ingest.period={period}")
        capture(site.captures / "a.parquet", 500)
        site.ingest()
        flows = site.flows()
        days = set(flows["ts"].dt.strftime("%Y-%m-%d"))
        assert set(flows["period"]) == (expected or days)


def test_layout_is_part_of_the_workspace() -> None:
    assert IngestConfig().n_buckets == 16
