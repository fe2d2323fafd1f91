"""Ingest: sharding, content hashes, corrected captures, and files that nobody can read."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayscan import planning
from rayscan.config import IngestConfig, RunConfig, load
from rayscan.errors import CommitConflict, ConfigError
from rayscan.keys import bucket_of
from rayscan.planning import CaptureFile, capture_units, find_captures
from rayscan.sequences import build
from rayscan.stages.ingest import Counts, _Ledger, advice_on, ingest_file
from rayscan.tables import CommitInfo, File, Workspace

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

    def books(self) -> list[dict[str, Any]]:
        return list(self.workspace.table("captures").read().to_pylist())

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
    assert (counts.captures, counts.same_content, counts.flows) == (2, 1, 1000)
    assert site.flows().height == 1000
    assert site.due() == []
    capture(site.captures / "c.parquet", seed=1)  # and later
    counts = site.ingest()
    assert (counts.captures, counts.same_content, counts.flows) == (1, 1, 0)
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


@pytest.mark.parametrize("after", [{"a": 2, "b": 0, "c": 1}, {"a": 1, "b": 2}])
def test_rotated_captures_keep_their_flows(site: Site, after: dict[str, int]) -> None:
    """What one path held yesterday another holds today."""
    for contents in ({"a": 0, "b": 1}, after):
        for name, seed in contents.items():
            capture(site.captures / name, 100 + seed, seed)
            os.utime(site.captures / name, (seed, seed))
        site.ingest()
        assert site.flows().height == sum(100 + seed for seed in contents.values())
        books = {Path(row["path"]).name: row["flows"] for row in site.books()}
        assert books == {name: 100 + seed for name, seed in contents.items()}
        assert site.due() == []


def test_content_that_another_path_still_has_stays(site: Site) -> None:
    capture(site.captures / "a.parquet", seed=1)
    capture(site.captures / "b.parquet", seed=1)
    site.ingest()
    capture(site.captures / "a.parquet", 500, seed=2)
    site.ingest()
    assert site.flows().height == 1500


def twins(site: Site, *names: str) -> None:
    """The same capture under several names: 1,000 flows, a row without a time, and one repeated."""
    capture(site.captures / names[0])
    table = pq.read_table(site.captures / names[0])
    gap = table.slice(0, 1).set_column(0, "ts", pa.nulls(1, table["ts"].type))
    for name in names:
        pq.write_table(pa.concat_tables([table, gap]), site.captures / name)
    site.ingest()


def check_books(site: Site, carrier: str, *others: str) -> None:
    """The first has the flows and the reject of `twins`, the others refer to it, and all adds up."""
    books = {Path(row["path"]).name: row for row in site.books()}
    assert sum(row["flows"] for row in books.values()) == site.flows().height
    assert (books[carrier]["flows"], books[carrier]["rejects"]) == (1000, 1)
    assert books[carrier]["format"] == "parquet"
    for name in others:
        assert (books[name]["flows"], books[name]["rejects"]) == (0, 0)
        assert books[name]["format"] == f"same content as {site.captures / carrier}"
    assert site.rejects() == {(carrier, "ts missing"): 1}
    assert site.due() == []


def test_a_twin_that_is_read_again_changes_no_figure(site: Site) -> None:
    twins(site, "a", "b", "c")
    check_books(site, "a", "b", "c")
    for k, name in enumerate("abca"):
        os.utime(site.captures / name, (k, k))
        site.ingest()
        check_books(site, "a", "b", "c")


def test_a_twin_takes_over_when_the_carrier_changes(site: Site) -> None:
    twins(site, "a", "b", "c")
    capture(site.captures / "a", 500, seed=2)
    assert site.ingest().flows == 500
    check_books(site, "b", "c")
    os.utime(site.captures / "c", (1, 1))
    capture(site.captures / "b", 600, seed=3)
    assert site.ingest().flows == 1600  # c was read in the same run
    check_books(site, "c")
    twins(site, "a", "b", "d")  # all of them as c is
    check_books(site, "c", "a", "b", "d")


def test_a_kill_while_a_twin_takes_over_is_repaired(site: Site) -> None:
    """Flows and rejects are committed, the books are not."""
    twins(site, "a", "b")
    capture(site.captures / "a", 500, seed=2)
    results = [ingest_file(site.workspace, file, site.config) for file in site.due()]
    ledger = _Ledger(site.workspace, planning.ingest_version(site.config), INFO)
    ledger.captures = Workspace.open(site.captures.parent / "other", site.config.ingest).table("captures")
    books = site.workspace.table("captures").read()
    ledger.seen["captures"] = ledger.captures.replace_rows("path", [], books, INFO)
    ledger.commit(results, Counts())
    assert {Path(file.path).name for file in site.due()} == {"a"}
    site.ingest()
    check_books(site, "b")


def test_the_same_content_read_with_other_settings_counts_once(site: Site) -> None:
    for name in ("a", "b"):
        capture(site.captures / f"{name}.parquet", 400, seed=1)
    site.ingest()
    paths = [f"captures.paths={site.captures}", "ingest.n_buckets=3", "captures.sensor=north"]
    site.config = load(sets=paths, env={})
    counts = site.ingest()
    assert (counts.captures, counts.same_content, counts.flows) == (2, 1, 400)
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


def test_two_that_ingest_the_same_at_once_count_it_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has looked at what is there, and the first commits before the second does."""
    capture(site.captures / "a.parquet")
    capture(site.captures / "b.parquet", 500, seed=2)
    results = [[ingest_file(site.workspace, file, site.config) for file in site.due()] for _ in range(2)]
    first, second = (
        _Ledger(site.workspace, planning.ingest_version(site.config), CommitInfo(run, "config"))
        for run in ("first", "second")
    )
    commit = second.flows.replace_files

    def late(*arguments: Any) -> int:
        first.commit(results[0], Counts())
        return commit(*arguments)

    monkeypatch.setattr(second.flows, "replace_files", late)
    with pytest.raises(CommitConflict, match=r"flows: another run has replaced .*nothing was written"):
        second.commit(results[1], Counts())
    assert site.flows().height == 1500
    assert sorted(row["flows"] for row in site.books()) == [500, 1000]
    assert site.due() == []


def test_a_run_that_was_overtaken_changes_no_books(site: Site) -> None:
    """It read a capture before that was corrected, and comes to commit after another run took the new one."""
    capture(site.captures / "a.parquet", seed=1)
    slow = [ingest_file(site.workspace, file, site.config) for file in site.due()]
    ledger = _Ledger(site.workspace, planning.ingest_version(site.config), INFO)
    capture(site.captures / "a.parquet", 700, seed=2)
    site.ingest()
    with pytest.raises(CommitConflict):
        ledger.commit(slow, Counts())
    assert site.flows().height == 700
    assert [row["flows"] for row in site.books()] == [700]
    assert site.due() == []


def test_many_that_ingest_at_once(site: Site) -> None:
    for number in range(3):
        capture(site.captures / f"{number}.parquet", 100, seed=number)
    conflicts, ready = [], threading.Barrier(4)

    def ingest() -> None:
        ready.wait()
        try:
            site.ingest()
        except CommitConflict as error:
            conflicts.append(error)

    threads = [threading.Thread(target=ingest) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conflicts) < 4  # one at least got through
    assert site.flows().height == sum(row["flows"] for row in site.books()) == 300
    site.ingest()  # whoever was stopped between flows and books
    assert site.flows().height == sum(row["flows"] for row in site.books()) == 300
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
    assert (counts.flows, counts.rejected, counts.incomplete) == (3000, 0, 5)
    assert site.flows().height == 3000
    rejects = site.rejects()
    assert sorted({name for name, _ in rejects}) == [
        "empty.parquet", "noise.bin", "secret.csv", "stranger.parquet", "truncated.parquet",
    ]  # fmt: skip
    assert set(rejects.values()) == {1}
    assert rejects["empty.parquet", "empty file"] == rejects["secret.csv", "empty file"] == 1
    assert set(site.workspace.table("rejects").read()["lost"].to_pylist()) == {"file"}
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


def test_what_could_not_be_read_keeps_its_flows_until_it_can(site: Site) -> None:
    place = site.captures / "a.parquet"
    capture(place, 300, seed=1)
    site.ingest()
    place.unlink()
    place.symlink_to(site.captures / "nowhere")
    assert site.ingest().incomplete == 1
    assert site.flows().height == 300
    assert [file.state for file in site.due()] == ["stale"]
    place.unlink()
    capture(place, 200, seed=2)
    assert site.ingest().flows == 200
    assert site.flows().height == 200
    assert site.rejects() == {}


def test_storage_that_refuses(site: Site) -> None:
    """A capture that may not be read, and one whose reading fails, cost only themselves."""
    capture(site.captures / "good.parquet", 100)
    (site.captures / "broken").symlink_to("/proc/self/mem")  # reading its beginning is an I/O error
    denied = site.captures / "denied.parquet"
    capture(denied, 100, seed=1)
    denied.chmod(0)
    due = site.due()
    with unprivileged():
        result = ingest_file(site.workspace, next(f for f in due if f.path == str(denied)), site.config)
    assert result.ended and result.ended.reason == "cannot be read: Permission denied"
    assert not result.finished
    denied.unlink()
    counts = site.ingest()
    assert (counts.captures, counts.flows, counts.incomplete) == (2, 100, 1)
    assert site.rejects() == {("broken", "cannot be read: Input/output error"): 1}
    assert [Path(file.path).name for file in site.due()] == ["broken"]


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Without the rights of root, which reads everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.timeout(60)
def test_names_that_utf8_cannot_hold(tmp_path: Path) -> None:
    """JSON can escape half a surrogate pair, which no table can hold."""
    site = Site(tmp_path, "captures.time_unit=s")
    capture(site.captures / "good.parquet", 100)
    (site.captures / "bad.json").write_text('{"\\ud800":1}\n')
    row = '"src":"1.2.3.4","dst_port":80,"proto":6'
    (site.captures / "odd.json").write_text(f'{{"ts\\ud800":1700000000,"ts":1700000000,{row}}}\n')
    (site.captures / "other.json").write_text(f'{{"ts\\ud800":1700000000,{row}}}\n')
    assert site.ingest().flows == 101
    assert sorted(name for name, _ in site.rejects()) == ["bad.json", "other.json"]
    formats = {Path(row["path"]).name: row["format"] for row in site.books()}
    assert formats == {
        **dict.fromkeys(("bad.json", "odd.json", "other.json"), "json"),
        "good.parquet": "parquet",
    }


def test_pipes_and_devices_are_refused(site: Site) -> None:
    """Reading one would wait for ever, or never come to an end."""
    capture(site.captures / "good.parquet", 100)
    os.mkfifo(site.captures / "pipe")
    (site.captures / "endless").symlink_to("/dev/zero")
    counts = site.ingest()
    assert (counts.captures, counts.flows, counts.incomplete) == (3, 100, 2)
    reason = "neither a file nor a folder, but a pipe, socket or device"
    assert site.rejects() == {("pipe", reason): 1, ("endless", reason): 1}
    assert site.due() == []


ROWS = b"".join(b"%d,20.0.%d.%d,23,tcp\n" % (1_704_067_200 + i, i % 7, i % 251) for i in range(50_000))


def test_a_file_that_grows_is_not_taken(tmp_path: Path) -> None:
    site = Site(tmp_path, "captures.time_unit=s")
    place = site.captures / "live.csv"
    place.write_bytes(b"ts,src,dst_port,proto\n" + ROWS)
    with repeatedly(lambda: place.open("ab").write(ROWS[:27])):
        assert site.ingest() == Counts(captures=1, incomplete=1)
    assert "changed while it was read" in next(iter(site.rejects()))[1]
    assert site.flows().height == 0
    assert site.ingest().flows == place.read_bytes().count(b"\n") - 1
    assert site.rejects() == {}


@contextlib.contextmanager
def repeatedly(action: Callable[[], object]) -> Iterator[None]:
    """Do something over and over while the block runs."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.002):
            action()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_object_storage(s3_prefix: str, tmp_path: Path) -> None:
    """Globs, prefixes, and an object that is replaced by one of equal size within the same second."""
    import boto3

    bucket = s3_prefix.split("/")[2]
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    put = partial(client.put_object, Bucket=bucket)
    for key in ("2024-01/a.csv", "2024-01/sub/b.csv", "2024-02/a.csv", "2024-02/c.txt"):
        put(Key=f"captures/{key}", Body=b"ts,src,dst_port,proto\n" + ROWS)

    def names(pattern: str) -> list[str]:
        paths = load(sets=[f"captures.paths=s3://{bucket}/{pattern}"], env={}).captures
        return [file.path.removeprefix(f"s3://{bucket}/captures/") for file in find_captures(paths)]

    assert names("captures/2024-02") == ["2024-02/a.csv", "2024-02/c.txt"]
    assert names("captures/*/a.csv") == ["2024-01/a.csv", "2024-02/a.csv"]
    assert names("cap*/2024-01") == ["2024-01/a.csv", "2024-01/sub/b.csv"]
    assert names("captures/**/*.csv") == ["2024-01/a.csv", "2024-01/sub/b.csv", "2024-02/a.csv"]
    site = Site(tmp_path, f"captures.paths=s3://{bucket}/captures/2024-02/a.csv", "captures.time_unit=s")
    turn = itertools.count()

    def replace() -> None:
        put(Key="captures/2024-02/a.csv", Body=b"ts,src,dst_port,%05d\n" % next(turn) + ROWS)

    replace()
    with repeatedly(replace):
        assert site.ingest() == Counts(captures=1, incomplete=1)
    time.sleep(1.1)  # S3 counts times in seconds, and the last object may have been read as a whole
    put(Key="captures/2024-02/a.csv", Body=b"ts,src,dst_port,proto\n" + ROWS)
    assert site.ingest().flows == 50_000


@pytest.mark.parametrize("order", ["forward", "backward", "overlapping"])
def test_captures_out_of_order_make_the_same_sequences(tmp_path: Path, order: str) -> None:
    """One capture in time order; the same flows in two that overlap, in any order of their rows."""
    site = Site(tmp_path, "ingest.period=all")
    whole = pl.from_arrow(capture(tmp_path / "whole.parquet", 3000))
    assert isinstance(whole, pl.DataFrame)
    distinct = pl.col("ts").rank("ordinal").cast(pl.Int64) + 1_704_067_200_000_000
    whole = whole.with_columns(ts=distinct.cast(pl.Datetime("us", "UTC")))
    parts = {
        "forward": [whole[:1500], whole[1500:]],
        "backward": [whole[1500:].reverse(), whole[:1500].reverse()],
        "overlapping": [whole[::2].sample(fraction=1, shuffle=True, seed=1), whole[1::2]],
    }
    for number, part in enumerate(parts[order]):
        part.write_parquet(site.captures / f"{number}.parquet")
        site.ingest()  # the second comes late, for a period that is there
    (unit, *_) = planning.sequence_units(site.workspace, site.config)
    found, dropped = build(site.workspace.table("flows").read_files(unit.files), 16, 4)
    bucket = int(unit.key["bucket"])
    mine = whole.filter(bucket_of(whole["src_ip"].to_numpy(), 3) == bucket)
    assert sum(found["length"].to_pylist()) + dropped.flows == mine.height
    for src, start, ports in zip(
        *(found[name].to_pylist() for name in ("src", "start", "dst_port")), strict=True
    ):
        flows = mine.filter((pl.col("src_ip") == src) & (pl.col("ts") >= start)).sort("ts")
        assert flows["dst_port"].to_list()[: len(ports)] == ports


def test_paths(tmp_path: Path) -> None:
    files = ("a.parquet", "b.csv", ".hidden", "_SUCCESS", "sub/c.parquet", "sub/deep/d[1].csv")
    for name in (*files, "ws/flows/d.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub" / "deep" / "circle").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()

    def names(*paths: str) -> list[str]:
        settings = load(sets=[f"captures.paths={list(paths)}"], env={}).captures
        found = find_captures(settings, str(tmp_path / "ws"))
        return [os.path.relpath(file.path, tmp_path) for file in found]

    everything = ["a.parquet", "b.csv", "sub/c.parquet", "sub/deep/d[1].csv"]
    assert names(str(tmp_path)) == everything
    assert names(f"{tmp_path}/*.parquet") == ["a.parquet"]
    assert names(f"{tmp_path}/**/*.parquet") == ["a.parquet", "sub/c.parquet"]
    assert names(f"{tmp_path}/**/*.csv", f"{tmp_path}/[ab].*") == ["a.parquet", "b.csv", "sub/deep/d[1].csv"]
    assert names(f"{tmp_path}/s?b") == ["sub/c.parquet", "sub/deep/d[1].csv"]  # a folder is read whole
    assert names(f"{tmp_path}/*") == everything
    assert names(f"{tmp_path}/sub/deep/d[1].csv") == ["sub/deep/d[1].csv"]  # it is there as it stands
    assert names(f"{tmp_path}/b.csv", f"{tmp_path}/b.csv", f"{tmp_path}/empty") == ["b.csv"]
    for path, message in {
        "nowhere": "nowhere is not there",
        "nowhere/*.csv": "is not there",
        "*.pcap": r"nothing matches .*/\*\.pcap",
        "ws": "holds no files",
        "empty": "holds no files",
    }.items():
        with pytest.raises(ConfigError, match=message):
            names(f"{tmp_path}/{path}")
    with pytest.raises(ConfigError, match=r"captures.paths is empty"):
        find_captures(load(env={}).captures)
    with pytest.raises(
        ConfigError, match=r"captures.format 'pcab' is not known; valid are auto, parquet, csv"
    ):
        find_captures(load(sets=["captures.format=pcab"], env={}).captures)


def test_a_folder_that_may_not_be_listed(tmp_path: Path) -> None:
    (tmp_path / "captures" / "secret").mkdir(parents=True)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "captures" / "secret").chmod(0)
    settings = load(sets=[f"captures.paths={tmp_path}/captures"], env={}).captures
    with unprivileged(), pytest.raises(ConfigError, match=r"cannot list .*/secret: Permission denied"):
        find_captures(settings)


def test_a_format_can_be_forced(site: Site) -> None:
    (site.captures / "a").write_text("#ts,src,dst_port,proto\n1704067200,1.2.3.4,23,6\n")
    sets = [f"captures.paths={site.captures}", "ingest.n_buckets=3", "captures.time_unit=s"]
    site.config = load(sets=[*sets, "captures.format=parquet"], env={})
    assert site.ingest().incomplete == 1
    assert "Parquet" in next(iter(site.rejects()))[1]
    site.config = load(sets=[*sets, "captures.format=csv"], env={})
    assert site.ingest().flows == 1


def test_period_all_and_day(tmp_path: Path) -> None:
    for period, expected in (("all", {"all"}), ("day", None)):
        (tmp_path / period).mkdir()
        site = Site(tmp_path / period, f"ingest.period={period}")
        capture(site.captures / "a.parquet", 500)
        site.ingest()
        flows = site.flows()
        days = set(flows["ts"].dt.strftime("%Y-%m-%d"))
        assert set(flows["period"]) == (expected or days)


def test_many_small_files_are_spoken_of() -> None:
    small, large = File("a", (), 10, 5_000), File("b", (), 10**6, 10**7)
    assert advice_on([]) is advice_on([small] * 4_999) is advice_on([large] * 6_000) is None
    assert "6,000 files of 5 kB on average" in str(advice_on([small] * 6_000))


def test_layout_is_part_of_the_workspace() -> None:
    assert IngestConfig().n_buckets == 16
