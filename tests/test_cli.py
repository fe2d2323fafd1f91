"""The command line: help, exit codes, errors that say what to do. Runs that need Ray: test_pipeline.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from click.testing import CliRunner, Result

from rayscan import schema
from rayscan.cli import main
from rayscan.config import IngestConfig
from rayscan.lease import lease
from rayscan.tables import Workspace


def rayscan(*words: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(main, [str(w) for w in words], catch_exceptions=False)


def test_help_names_every_command_in_pipeline_order() -> None:
    text = rayscan("--help").stdout
    names = [
        "simulate",
        "run",
        "ingest",
        "sequences",
        "train",
        "embed",
        "cluster",
        "campaigns",
        "evaluate",
        "report",
    ]
    places = [text.index(f"\n  {name} ") for name in names]
    assert places == sorted(places)
    assert "Exit codes" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run"], 2, "Missing option '-w'"),
        (["rnu"], 2, "No such command 'rnu'"),
        (["run", "-w", "W", "--set", "train.stpes=3"], 2, "did you mean train.steps?"),
        (["run", "-w", "W", "--set", "captures.paths=/no/where"], 2, "/no/where is not there"),
        (["run", "-w", "W"], 1, "is no rayscan workspace"),
        (["status", "-w", "W"], 1, "is no rayscan workspace"),
        (["run", "-w", "W", "--config", "no.yaml"], 2, "cannot read the config file no.yaml"),
        (["config", "validate", "--preset", "quikc"], 2, "did you mean quick?"),
        (["simulate", "S", "--sources", "3"], 2, "source"),
    ],
)
def test_errors_say_what_and_what_to_do(
    words: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = rayscan(*words)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "W").exists()  # nothing is made for a command that cannot run


def test_a_stage_without_its_input_says_which_command_to_run(tmp_path: Path) -> None:
    Workspace.open(tmp_path, IngestConfig())
    result = rayscan("train", "-w", tmp_path)
    assert result.exit_code == 1
    assert "there are no sequences: no source" in result.stderr
    for stage in ("embed", "cluster", "campaigns", "evaluate", "report"):
        result = rayscan(stage, "-w", tmp_path)
        assert result.exit_code == 1
        assert "run `rayscan train`" in result.stderr
    outcome = json.loads((tmp_path / "runs" / "main" / "run.json").read_text())
    assert (outcome["status"], outcome["exit_code"]) == ("failed", 1)
    assert "DataError" in outcome["error"]


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    rayscan("simulate", tmp_path / "t", "--months", 1, "--sources", 200, "--flows", 4000)
    words = ["ingest", "-w", tmp_path / "ws", "--set", f"captures.paths={tmp_path / 't' / 'captures'}"]
    code = f"from rayscan.cli import main; main({[*map(str, words), '--address', '127.0.0.1:1']!r})"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )  # with no Ray of its own
    assert ended.returncode == 1
    assert "cannot reach the Ray cluster at 127.0.0.1:1" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_newer_workspace_is_refused(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path, IngestConfig())
    facts = {**(workspace.facts() or {}), "schema_version": schema.VERSION + 1}
    workspace.write_json("workspace.json", facts)
    result = rayscan("status", "-w", tmp_path)
    assert result.exit_code == 1
    assert "Upgrade rayscan, or use another workspace" in result.stderr


def test_config_commands() -> None:
    shown = rayscan("config", "show", "--preset", "quick", "--set", "train.steps=7")
    assert yaml.safe_load(shown.stdout)["train"]["steps"] == 7
    assert rayscan("config", "validate").exit_code == 0
    described = json.loads(rayscan("config", "schema").stdout)
    assert described["$defs"]["TrainConfig"]["properties"]["steps"]["description"]


def test_environment_sets_options_and_settings(tmp_path: Path) -> None:
    env = {"RAYSCAN_PRESET": "quick", "RAYSCAN_TRAIN__STEPS": "9"}
    shown = yaml.safe_load(rayscan("config", "show", env=env).stdout)
    assert (shown["train"]["steps"], shown["sequences"]["length"]) == (9, 16)


def test_simulate_writes_what_ingest_reads(tmp_path: Path) -> None:
    words = ["simulate", tmp_path, "--months", 1, "--sources", 200, "--flows", 4000]
    assert rayscan(*words).stdout.strip() == str(tmp_path / "captures")
    facts = json.loads(rayscan(*words, "--json").stdout)
    assert facts["flows"] == 4000
    frame = pl.read_parquet(tmp_path / "captures" / "*.parquet")
    assert frame.height == 4000
    assert {"ts", "src_ip", "dst_ip", "dst_port", "proto"} <= set(frame.columns)
    assert pl.read_parquet(tmp_path / "truth.parquet")["flows"].sum() == 4000


def test_dry_run_of_a_new_workspace(tmp_path: Path) -> None:
    rayscan("simulate", tmp_path / "t", "--months", 2, "--sources", 200, "--flows", 4000)
    result = rayscan(
        "run", "-w", tmp_path / "ws", "--set", f"captures.paths={tmp_path / 't' / 'captures'}", "--dry-run",
        "--json",
    )  # fmt: skip
    due = {row["stage"]: row["due"] for row in json.loads(result.stdout)}
    assert due == {"ingest": 2, **dict.fromkeys(
        ["sequences", "train", "embed", "cluster", "campaigns", "evaluate", "report"], 1)}  # fmt: skip
    assert not (tmp_path / "ws").exists()


def test_vacuum_lists_and_deletes_leftovers(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path, IngestConfig())
    captures = schema.CAPTURES.empty_table()
    row = {name: "x" if name in ("capture", "path", "format") else 0 for name in schema.CAPTURES.names}
    row |= {"modified": None, "first": None, "last": None}
    captures = captures.from_pylist([row], schema.CAPTURES)
    table = workspace.table("captures")
    from rayscan.tables import CommitInfo

    table.replace_rows("path", ["x"], captures, CommitInfo("r", "h"))
    orphan = table.write(captures, {})
    listed = rayscan("vacuum", "-w", tmp_path, "--older-than", 0, "--dry-run")
    assert listed.stdout.split() == [f"captures/{orphan.path}"]
    assert "1 files would be deleted" in listed.stderr
    with lease(workspace, "run-main"):
        refused = rayscan("vacuum", "-w", tmp_path, "--older-than", 0)
    assert (refused.exit_code, "is at work on run-main" in refused.stderr) == (4, True)
    assert (tmp_path / "captures" / orphan.path).exists()
    assert rayscan("vacuum", "-w", tmp_path, "--older-than", -1).exit_code == 2
    rayscan("vacuum", "-w", tmp_path, "--older-than", 0.9)  # of an hour, not of none
    assert (tmp_path / "captures" / orphan.path).exists()
    rayscan("vacuum", "-w", tmp_path, "--older-than", 0)
    assert not (tmp_path / "captures" / orphan.path).exists()
    assert np.array_equal(table.read()["path"], ["x"])


def test_unlock_says_whether_there_was_a_lease(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path, IngestConfig())
    free = rayscan("unlock", "-w", tmp_path, "run-main")
    assert (free.exit_code, "nobody holds run-main; no lease is held" in free.stderr) == (4, True)
    with lease(workspace, "run-main"):
        wrong = rayscan("unlock", "-w", tmp_path, "main")
        assert (wrong.exit_code, "nobody holds main; held are run-main" in wrong.stderr) == (4, True)
        ended = rayscan("unlock", "-w", tmp_path, "run-main")
        assert (ended.exit_code, "run-main is free" in ended.stderr) == (0, True)
