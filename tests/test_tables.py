"""Tables: commits are atomic and idempotent, stale writers are refused, leftovers stay invisible."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables_of_sequences import sequences_of

from rayscan import schema
from rayscan.config import IngestConfig
from rayscan.errors import CommitConflict, ConfigError, Gone, SchemaError, WorkspaceError
from rayscan.tables import CommitInfo, Key, Table, Workspace, fingerprint, key_name

INFO = CommitInfo("run", "config", "input")
KEY: Key = {"model": "m", "period": "2024-01", "bucket": 1}
OTHER: Key = {"model": "m", "period": "2024-01", "bucket": 2}


def rows(*ids: int) -> pa.Table:
    return pa.table(
        {
            "sequence_id": list(ids),
            "src": [i % 7 for i in ids],
            "start": pa.array([1_700_000_000_000_000 + i for i in ids], schema.TIME),
            "vector": pa.array([[i, 0.5] for i in ids], pa.list_(pa.float32())),
        },
        schema=schema.EMBEDDINGS,
    )


def put(table: Table, key: Key, *ids: int, made_from: int = 1, read_version: int | None = None) -> int:
    files = [table.write(rows(*ids), key)] if ids else []
    return table.replace([key], files, {key_name(key): made_from}, INFO, read_version)


def ids(table: Table, where: Key | None = None) -> list[int]:
    return sorted(table.read(where, ["sequence_id"])["sequence_id"].to_pylist())


@pytest.fixture
def table(storage: str) -> Table:
    return Workspace.open(storage, IngestConfig()).table("embeddings")


def test_replace_read_done(table: Table) -> None:
    assert table.version() == -1
    assert table.read().num_rows == 0
    assert not table.is_done(KEY, 1)
    put(table, KEY, 1, 2, made_from=5)
    put(table, OTHER, 3, made_from=6)
    assert ids(table) == [1, 2, 3]
    assert ids(table, {"bucket": 2}) == [3]
    assert table.is_done(KEY, 5)
    assert not table.is_done(KEY, 6)
    put(table, KEY, 4, made_from=7)
    assert ids(table) == [3, 4]
    assert ids(table, {"period": "2024-01"}) == [3, 4]
    assert table.read(version=1)["sequence_id"].to_pylist() == [1, 2]  # time travel
    back = table.read(KEY)
    assert back.column_names == ["model", "period", "bucket", *schema.EMBEDDINGS.names]
    assert back["vector"].to_pylist() == [[4.0, 0.5]]
    assert back["bucket"].to_pylist() == [1]


def test_a_key_can_be_replaced_by_nothing_and_is_done_then(table: Table) -> None:
    put(table, KEY, 1)
    put(table, KEY, made_from=9)
    assert ids(table) == []
    assert table.is_done(KEY, 9)


def test_two_keys_in_one_commit(table: Table) -> None:
    put(table, KEY, 1)
    files = [table.write(rows(7), KEY), table.write(rows(8), OTHER)]
    before = table.version()
    table.replace([KEY, OTHER], files, {key_name(KEY): 2, key_name(OTHER): 2}, INFO)
    assert table.version() == before + 1
    assert ids(table) == [7, 8]


def test_a_stale_writer_is_refused(table: Table) -> None:
    put(table, KEY, 1, made_from=1)
    seen = table.version()
    put(table, KEY, 2, made_from=2)
    with pytest.raises(CommitConflict, match="another run has replaced model=m/period=2024-01/bucket=1"):
        put(table, KEY, 3, made_from=3, read_version=seen)
    assert ids(table) == [2]
    assert table.is_done(KEY, 2)


def test_a_stale_writer_of_an_empty_key_is_refused(table: Table) -> None:
    put(table, OTHER, 1)
    seen = table.version()
    put(table, KEY, made_from=2)
    with pytest.raises(CommitConflict):
        put(table, KEY, 3, made_from=3, read_version=seen)


def test_a_stale_writer_of_another_key_is_welcome(table: Table) -> None:
    put(table, KEY, 1)
    seen = table.version()
    put(table, OTHER, 2)
    put(table, KEY, 3, read_version=seen)
    assert ids(table) == [2, 3]


def test_the_first_commit_of_all_can_conflict_too(table: Table) -> None:
    put(table, KEY, 1)
    with pytest.raises(CommitConflict):
        put(table, KEY, 2, made_from=2, read_version=-1)
    put(table, OTHER, 3, read_version=-1)
    assert ids(table) == [1, 3]


def test_files_outside_the_key_are_refused(table: Table) -> None:
    with pytest.raises(ValueError, match="does not belong"):
        table.replace([KEY], [table.write(rows(1), OTHER)], {}, INFO)


def test_rows_of_other_columns_are_refused(table: Table) -> None:
    with pytest.raises(SchemaError, match=r"lack columns \['src'\] or have others \['source'\]"):
        table.write(rows(1).rename_columns(["sequence_id", "source", "start", "vector"]), KEY)


def test_read_rows_reads_a_slice(table: Table) -> None:
    file = table.write(rows(*range(1000)), KEY)
    for start, stop in ((0, 1), (0, 1000), (998, 1000), (400, 400)):
        found = table.read_rows(file, start, stop, ["sequence_id"])["sequence_id"].to_pylist()
        assert found == list(range(start, stop))


def test_whether_all_rows_record_a_column(storage: str) -> None:
    sequences = Workspace.open(storage, IngestConfig()).table("sequences")
    whole = sequences_of([[{}], [{}, {}]])
    ports = pa.array([[1], [2, 3]], pa.list_(pa.int32()))
    at = schema.SEQUENCES.get_field_index("src_port")
    files = [
        sequences.write(table, {"period": "2024-01", "bucket": bucket})
        for bucket, table in enumerate((whole, whole.set_column(at, "src_port", ports)))
    ]
    assert not sequences.records(files, "src_port")
    assert not sequences.records(files[:1], "src_port")
    assert sequences.records(files[1:], "src_port")
    assert sequences.records(files, "dst")


def test_rows_of_a_small_table_are_replaced_by_value(storage: str) -> None:
    rejects = Workspace.open(storage, IngestConfig()).table("rejects")

    def row(path: str, count: int) -> dict[str, object]:
        return {"capture": "c", "path": path, "offset": None, "reason": "r", "count": count, "lost": "rows"}

    for path, count in (("a", 1), ("b", 2), ("a", 3)):
        found = pa.Table.from_pylist([row(path, count)], schema.REJECTS)
        rejects.replace_rows("path", [path], found, INFO)
    assert sorted((r["path"], r["count"]) for r in rejects.read().to_pylist()) == [("a", 3), ("b", 2)]
    rejects.replace_rows("path", ["a", "b"], schema.REJECTS.empty_table(), INFO)
    assert rejects.read().num_rows == 0


def test_single_files_are_replaced(table: Table) -> None:
    old = table.write(rows(1), KEY, "aa")
    table.append([old, table.write(rows(2), KEY, "bb")], {"capture=aa": 1}, INFO)
    table.replace_files([old.path], [table.write(rows(3), KEY, "cc")], {"capture=cc": 1}, INFO)
    assert ids(table) == [2, 3]
    assert [file.path.split("/")[-1][:2] for file in table.files()] == ["bb", "cc"]


def test_uncommitted_files_are_invisible_and_vacuumed(table: Table) -> None:
    put(table, KEY, 1)
    orphan = table.write(rows(9), KEY)
    assert ids(table) == [1]
    assert table.vacuum(0, dry_run=True) == [orphan.path]
    assert table.vacuum(0) == [orphan.path]
    assert table.vacuum(0) == []
    assert ids(table) == [1]


def test_versions_that_are_cleaned_up_are_gone(tmp_path: Path) -> None:
    """Their log has expired, as Delta lets it after a time; or their files were vacuumed."""
    table = Workspace.open(tmp_path, IngestConfig()).table("embeddings")
    for number in range(25):
        put(table, KEY, number, made_from=number)
    table.vacuum(0)
    newest = table.version()
    with pytest.raises(Gone, match=r"part-\w+\.parquet is gone: vacuumed"):
        table.read(version=15)
    for log in sorted((tmp_path / "embeddings" / "_delta_log").glob("*.json"))[:11]:
        log.unlink()
    for version in (3, 10, newest + 1):
        with pytest.raises(Gone, match=f"embeddings has no version {version} any more"):
            table.read(version=version)
    assert table.files(version=-1) == []
    assert ids(table) == ids(Workspace.open(tmp_path).table("embeddings")) == [24]


def test_other_readers_see_the_table(tmp_path: Path) -> None:
    table = Workspace.open(tmp_path, IngestConfig()).table("embeddings")
    put(table, KEY, 1, 2)
    put(table, KEY, 3)
    found = pl.read_delta(str(tmp_path / "embeddings"))
    assert found["sequence_id"].to_list() == [3]
    assert found["bucket"].to_list() == [1]
    listed = [str(tmp_path / "embeddings" / file.path) for file in table.files()]
    query = "select sequence_id, bucket from read_parquet(?, hive_partitioning => true)"
    assert duckdb.execute(query, [listed]).fetchall() == [(3, 1)]


def test_commits_say_where_they_come_from(tmp_path: Path) -> None:
    table = Workspace.open(tmp_path, IngestConfig()).table("embeddings")
    put(table, KEY, 1)
    log = (tmp_path / "embeddings" / "_delta_log" / "00000000000000000001.json").read_text()
    assert '"rayscan.run":"run"' in log
    assert '"rayscan.config":"config"' in log
    assert '"rayscan.input":"input"' in log


MODEL = st.lists(
    st.tuples(st.sampled_from([KEY, OTHER]), st.lists(st.integers(0, 99), unique=True, max_size=4)),
    max_size=6,
)


@settings(max_examples=15, deadline=None)
@given(MODEL)
def test_any_series_of_replaces_equals_a_dictionary(series: list[tuple[Key, list[int]]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table = Workspace.open(folder, IngestConfig()).table("embeddings")
        model: dict[str, list[int]] = {}
        for number, (key, wanted) in enumerate(series):
            for _ in range(2):  # idempotent
                put(table, key, *wanted, made_from=number)
            model[key_name(key)] = wanted
            assert table.is_done(key, number)
        assert ids(table) == sorted(i for wanted in model.values() for i in wanted)


# ---------------------------------------------------------------------------------------------
# Kills and races, with real processes
# ---------------------------------------------------------------------------------------------

DIE_BEFORE_COMMIT = """
import os, signal, sys
sys.path.insert(0, os.environ["HERE"])
from test_tables import *
table = Workspace.open(sys.argv[1]).table("embeddings")
table.write(rows(7, 8, 9), KEY)
os.kill(os.getpid(), signal.SIGKILL)
"""

REPLACE_FOR_EVER = """
import os, sys
sys.path.insert(0, os.environ["HERE"])
from test_tables import *
table = Workspace.open(sys.argv[1]).table("embeddings")
print("go", flush=True)
for n in range(1000, 10**9):
    put(table, KEY, n, n + 10**6, made_from=n)
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HERE": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_a_kill_between_write_and_commit_changes_nothing(tmp_path: Path) -> None:
    table = Workspace.open(tmp_path, IngestConfig()).table("embeddings")
    put(table, KEY, 1, 2, made_from=5)
    died = python(DIE_BEFORE_COMMIT, str(tmp_path))
    died.communicate()
    assert died.returncode == -signal.SIGKILL
    assert ids(table) == [1, 2]
    assert table.is_done(KEY, 5)
    put(table, KEY, 7, 8, 9, made_from=6)
    assert ids(table) == [7, 8, 9]
    assert len(table.vacuum(0)) == 2  # the orphan and what was replaced


def test_a_kill_at_any_time_leaves_a_whole_commit(tmp_path: Path) -> None:
    table = Workspace.open(tmp_path, IngestConfig()).table("embeddings")
    chance = random.Random(3)
    for _ in range(4):
        writer = python(REPLACE_FOR_EVER, str(tmp_path))
        assert writer.stdout
        assert writer.stdout.readline() == "go\n"
        time.sleep(chance.uniform(0.05, 0.4))
        writer.kill()
        writer.communicate()
        found = ids(table)
        if len(found) > 1:  # it came to a commit
            first, second = found
            assert second == first + 10**6
            assert table.is_done(KEY, first)
        put(table, KEY, 1, made_from=1)  # goes on after it
        assert ids(table) == [1]


def _race(uri: str, number: int, barrier: object, results: object) -> None:
    table = Workspace.open(uri).table("embeddings")
    seen = table.version()
    barrier.wait()  # type: ignore[attr-defined]
    try:
        put(table, KEY, number, made_from=number, read_version=seen)
        put(table, {**KEY, "bucket": 100 + number}, number)
        results.put((number, "won"))  # type: ignore[attr-defined]
    except CommitConflict:
        results.put((number, "conflict"))  # type: ignore[attr-defined]


def test_of_writers_of_one_key_one_wins(storage: str) -> None:
    table = Workspace.open(storage, IngestConfig()).table("embeddings")
    put(table, OTHER, 50)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    writers = [context.Process(target=_race, args=(storage, n, barrier, results)) for n in range(1, 5)]
    for writer in writers:
        writer.start()
    outcome = dict(results.get(timeout=240) for _ in writers)
    for writer in writers:
        writer.join()
    assert sorted(outcome.values()) == ["conflict", "conflict", "conflict", "won"]
    winner = next(number for number, how in outcome.items() if how == "won")
    assert ids(table, KEY) == [winner]
    assert ids(table) == sorted([winner, winner, 50])


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
REPLACE = """
import os, sys
sys.path.insert(0, os.environ["HERE"])
from test_tables import *
table = Workspace.open(sys.argv[1]).table("embeddings")
put(table, KEY, 7, made_from=7, read_version=table.version())
print(datetime.now().year)
"""


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
def test_a_clock_that_goes_back_by_years_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions are numbers: what is newest, done and in use is told without clocks."""
    table = Workspace.open(tmp_path, IngestConfig()).table("embeddings")
    put(table, KEY, 1, made_from=1)
    put(table, OTHER, 2, made_from=1)
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
    monkeypatch.setenv("FAKETIME", "-1500d")
    year, _ = python(REPLACE, str(tmp_path)).communicate()
    monkeypatch.delenv("LD_PRELOAD")
    assert int(year) < datetime.now().year
    assert ids(table) == [2, 7]
    assert table.is_done(KEY, 7)
    put(table, KEY, 8, made_from=8, read_version=table.version())
    assert ids(table) == [2, 8]
    table.vacuum(168)
    assert ids(table) == [2, 8]


# ---------------------------------------------------------------------------------------------
# Workspaces
# ---------------------------------------------------------------------------------------------


def test_a_workspace_of_a_newer_version_is_refused(storage: str) -> None:
    workspace = Workspace.open(storage, IngestConfig())
    facts = {**(workspace.facts() or {}), "schema_version": schema.VERSION + 1, "created_by": "rayscan 9.0"}
    workspace.write_json("workspace.json", facts)
    with pytest.raises(
        WorkspaceError, match=rf"rayscan 9\.0 with tables of version {schema.VERSION + 1}.*Upgrade"
    ):
        Workspace.open(storage)


def test_a_workspace_laid_out_differently_is_refused(tmp_path: Path) -> None:
    Workspace.open(tmp_path, IngestConfig(period="day", n_buckets=4))
    Workspace.open(tmp_path)
    with pytest.raises(ConfigError, match=r"laid out with ingest.n_buckets=4, not 8; set ingest.n_buckets=4"):
        Workspace.open(tmp_path, IngestConfig(period="day", n_buckets=8))


def test_of_first_runs_with_different_layouts_one_wins(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have looked and found nothing before any of them lays the workspace out."""
    facts, looked = Workspace.facts, threading.Barrier(3)

    def look(workspace: Workspace) -> Any:
        found = facts(workspace)
        looked.wait(120)
        return found

    monkeypatch.setattr(Workspace, "facts", look)
    for number in range(3):
        uri = f"{storage}/{number}"
        outcomes: dict[int, str] = {}

        def first_run(n_buckets: int, uri: str = uri, outcomes: dict[int, str] = outcomes) -> None:
            try:
                Workspace.open(uri, IngestConfig(n_buckets=n_buckets))
                outcomes[n_buckets] = "won"
            except ConfigError as error:
                outcomes[n_buckets] = str(error)

        threads = [threading.Thread(target=first_run, args=(n,)) for n in (2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (n for n, how in outcomes.items() if how == "won")
        assert (facts(Workspace(uri)) or {})["n_buckets"] == winner
        lost = [how for how in outcomes.values() if how != "won"]
        assert all(f"set ingest.n_buckets={winner}, or use another" in how for how in lost)
        assert len(lost) == 2


def test_what_is_no_workspace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="is no rayscan workspace"):
        Workspace.open(tmp_path)
    (tmp_path / "workspace.json").write_text("{")
    with pytest.raises(WorkspaceError, match="damaged"):
        Workspace.open(tmp_path)
    with pytest.raises(ConfigError, match="ftp:// is not supported"):
        Workspace.open("ftp://x/y", IngestConfig())
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match="cannot create the folder"):
        Workspace.open(tmp_path / "file" / "ws", IngestConfig())


def test_plain_files(storage: str) -> None:
    workspace = Workspace.open(storage, IngestConfig())
    with pytest.raises(FileNotFoundError):
        workspace.read_bytes("models/x/a.json")
    assert workspace.read_json("models/x/a.json") is None
    workspace.write_json("models/x/a.json", {"a": 1})
    workspace.write_json("models/x/a.json", {"a": 2})
    assert workspace.read_json("models/x/a.json") == {"a": 2}
    workspace.delete("models/x")
    workspace.delete("models/x")
    assert workspace.read_json("models/x/a.json") is None


def test_workspaces_travel_without_credentials(s3_prefix: str) -> None:
    workspace = Workspace.open(s3_prefix, IngestConfig())
    workspace.write_bytes("x", b"1")  # builds the file system
    sent = pickle.dumps(workspace)
    assert b"testing" not in sent
    assert pickle.loads(sent).read_bytes("x") == b"1"


def test_fingerprints_tell_parts_apart() -> None:
    different = [("a", "b"), ("ab",), ("a", ["b"]), (["a", "b"],), ("a", "b", 1), ("a", "b", "1")]
    found = {fingerprint(*parts) for parts in different}
    assert len(found) == len(different)
    assert all(0 <= value < 2**63 for value in found)
    assert json.loads(json.dumps(max(found))) == max(found)
