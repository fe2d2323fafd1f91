"""Workspaces of an older version: refused, brought up without rewriting a file, and back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from tables_of_sequences import sequences_of

from rayscan import schema, tables
from rayscan.cli import main
from rayscan.config import IngestConfig
from rayscan.lease import lease
from rayscan.tables import CommitInfo, File, Workspace

NEW = ("src_port", "icmp_code")
INFO = CommitInfo("r", "h")
KEYS: list[dict[str, Any]] = [{"period": "2024-01", "bucket": bucket} for bucket in (0, 1, 2)]


def upgrade(uri: str, *words: str) -> Result:
    return CliRunner().invoke(main, ["upgrade", "-w", uri, *words], catch_exceptions=False)


def put(workspace: Workspace, key: dict[str, Any], made_from: int) -> File:
    table = workspace.table("sequences")
    rows = sequences_of([[{}, {}]] * 10)
    place = rows.schema.get_field_index("icmp_code")
    rows = rows.set_column(
        place, rows.schema.field(place), pa.array([[0, 8]] * 10, rows.schema.field(place).type)
    )
    file = table.write(rows.select(table.schema.names), key)
    table.replace([key], [file], {tables.key_name(key): made_from}, INFO)
    return file


@pytest.fixture
def old(storage: str, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Two buckets of sequences, as version 1 wrote them: without the columns that came later."""
    with monkeypatch.context() as before:
        fields = [field for field in schema.SEQUENCES if field.name not in NEW]
        before.setitem(tables._SCHEMAS, "sequences", pa.schema(fields))
        before.setattr(schema, "VERSION", 1)
        workspace = Workspace.open(storage, IngestConfig())
        for number, key in enumerate(KEYS[:2]):
            put(workspace, key, 100 + number)
    return workspace


def test_a_workspace_is_brought_up_and_back(old: Workspace) -> None:
    table, uri = old.table("sequences"), old.uri
    before, version = {file.path for file in table.files()}, table.version()
    refused = CliRunner().invoke(main, ["status", "-w", uri])
    assert refused.exit_code == 1
    assert f"run `rayscan upgrade -w {uri}`" in refused.stderr

    shown = upgrade(uri, "--dry-run")
    assert (shown.exit_code, shown.stderr) == (0, f"sequences: version {version} gets src_port, icmp_code\n")
    assert (table.version(), table.lacking()) == (version, list(NEW))

    assert upgrade(uri).exit_code == 0
    assert upgrade(uri).exit_code == 4
    assert {file.path for file in table.files()} == before  # nothing is rewritten
    assert table.is_done(KEYS[0], 100)
    rows = Workspace.open(uri).table("sequences").read(columns=["sequence_id", *NEW])
    assert rows["src_port"].null_count == rows["icmp_code"].null_count == rows.num_rows == 20
    put(old, KEYS[1], 7)
    put(old, KEYS[2], 8)
    assert table.read(columns=["icmp_code"])["icmp_code"].null_count == 10

    assert upgrade(uri, "--back").exit_code == 0
    assert {file.path for file in table.files()} == before
    assert table.lacking() == list(NEW)
    assert table.done(KEYS) == dict(zip(map(tables.key_name, KEYS), (100, 101, 0), strict=True))
    assert (old.facts() or {})["schema_version"] == 1
    assert "there is no way back" in upgrade(uri, "--back").stderr

    assert upgrade(uri).exit_code == 0  # and once more
    assert table.lacking() == []


def test_an_upgrade_that_was_killed_is_finished(old: Workspace) -> None:
    table = old.table("sequences")
    version = table.version()
    old.write_json(
        "upgrades/2.json", {"from": 1, "to": 2, "tables": {"sequences": {"version": version, "columns": NEW}}}
    )
    table.add_columns(NEW[:1])
    assert upgrade(old.uri).exit_code == 0
    assert upgrade(old.uri, "--back").exit_code == 0
    assert table.lacking() == list(NEW)


def test_nobody_may_be_at_work(old: Workspace) -> None:
    with lease(old, "run-main"):
        refused = upgrade(old.uri)
    assert refused.exit_code == 4
    assert "is at work on run-main; upgrade when it is done" in refused.stderr


def test_what_no_upgrade_is_known_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setitem(tables._SCHEMAS, "rejects", pa.schema([pa.field("path", pa.int64())]))
        before.setattr(schema, "VERSION", 1)
        workspace = Workspace.open(tmp_path / "ws", IngestConfig())
        table = workspace.table("rejects")
        table.append([table.write(pa.table({"path": [1]}), {})], {"x": 1}, INFO)
    refused = upgrade(workspace.uri)
    assert refused.exit_code == 1
    assert "rejects: column path is int64, not string: no upgrade is known" in refused.stderr
