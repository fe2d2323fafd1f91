"""Lists of known scanners in a workspace: taken in once, shown, asked and taken out, as users do it."""

from __future__ import annotations

import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from report_example import sequence, sequence_table

from rayscan.cli import main
from rayscan.config import IngestConfig, RunConfig, load
from rayscan.errors import ConfigError, DataError
from rayscan.planning import scanner_version
from rayscan.stages.lists import label_lists, relabelled, scanners
from rayscan.tables import CommitInfo, Workspace

IPSET = "add censys.io 74.120.14.0/24\nadd shodan.io 66.240.192.138/32\nadd shodan.io nonsense\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "ws", IngestConfig())


def rayscan(workspace: Workspace, *words: str) -> Result:
    command = ["scanners", words[0], "-w", workspace.uri, *words[1:]]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def listed(workspace: Workspace) -> list[dict[str, Any]]:
    return list(json.loads(rayscan(workspace, "list", "--json").stdout))


def config(*sets: str) -> RunConfig:
    return load(sets=sets, env={})


def test_a_list_is_taken_in_once(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.ipset").write_text(IPSET)
    (tmp_path / "again.gz").write_bytes(gzip.compress(b"# the same\n" + IPSET.encode()))
    assert listed(workspace) == [] and scanner_version(workspace, config()) == ""
    first = rayscan(workspace, "import", str(tmp_path / "a.ipset"), "--from", "2024-11-01", "--source", "us")
    assert first.exit_code == 3  # a line is no network
    assert "2 networks, dated by --from; 1 are no network" in first.stderr
    version = scanner_version(workspace, config())
    again = rayscan(
        workspace, "import", str(tmp_path / "again.gz"), "--from", "2024-11-01", "--source", "us", "--json"
    )
    (facts,) = json.loads(again.stdout)
    assert (facts["new"], facts["networks"], facts["bad"]) == (False, 2, 1)
    assert scanner_version(workspace, config()) == version
    (row,) = listed(workspace)
    assert (row["source"], row["networks"], row["organisations"]) == ("us", 2, 2)
    assert (row["valid_from"], row["valid_to"]) == ("2024-11-01", "2024-11-01")


def test_other_dates_are_another_list_and_can_be_taken_out(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("192.0.2.0/24\n")
    take = ["import", str(tmp_path / "a.txt"), "--organisation", "x"]
    assert rayscan(workspace, *take).exit_code == 2  # no date, and none is made up
    assert listed(workspace) == []
    assert rayscan(workspace, *take, "--from", "2023-01-01", "--to", "2023-12-31").exit_code == 0
    one = scanner_version(workspace, config())
    assert rayscan(workspace, *take, "--from", "2024-06-01").exit_code == 0
    assert rayscan(workspace, *take, "--from", "2024-06-01").exit_code == 4
    both = listed(workspace)
    assert [row["valid_from"] for row in both] == ["2023-01-01", "2024-06-01"]
    assert scanner_version(workspace, config()) != one
    assert scanner_version(workspace, config("scanners.tolerance_days=1")) != scanner_version(
        workspace, config()
    )
    assert rayscan(workspace, "remove", both[1]["list"]).exit_code == 0
    assert scanner_version(workspace, config()) == one
    assert rayscan(workspace, "remove", both[1]["list"]).exit_code == 1
    assert rayscan(workspace, *take, "--from", "2024-06-01").exit_code == 0
    assert listed(workspace) == both


def test_names_are_shown_as_they_are(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("192.0.2.0/24\n")
    words = ["import", str(tmp_path / "a.txt"), "--organisation", "[/x]", "--from", "2023-01-01"]
    assert rayscan(workspace, *words, "--source", "[red]y").exit_code == 0
    assert "[red]y" in rayscan(workspace, "list").stdout
    assert "[/x]" in rayscan(workspace, "lookup", "192.0.2.9").stdout


def test_lookup(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("192.0.2.0/24\n")
    rayscan(workspace, "import", str(tmp_path / "a.txt"), "--organisation", "x", "--from", "2023-01-01")
    everything = json.loads(rayscan(workspace, "lookup", "192.0.2.9", "--json").stdout)
    assert [(row["network"], row["organisation"]) for row in everything] == [("192.0.2.0/24", "x")]
    near = json.loads(rayscan(workspace, "lookup", "192.0.2.9", "--date", "2023-03-01", "--json").stdout)
    assert near[0]["days_off"] == (date(2023, 3, 1) - date(2023, 1, 1)).days
    far = rayscan(workspace, "lookup", "192.0.2.9", "--date", "2024-03-01")
    assert (far.stdout, far.stderr) == ("", "no list knows 192.0.2.9 on that day\n")
    allowed = ["--set", "scanners.tolerance_days=1000"]
    assert (
        "192.0.2.0/24" in rayscan(workspace, "lookup", "192.0.2.9", "--date", "2024-03-01", *allowed).stdout
    )
    assert rayscan(workspace, "lookup", "192.0.2").exit_code == 2


def test_pseudonyms_are_never_named(tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "ws", IngestConfig(addresses="cryptopan"))
    (tmp_path / "a.ipset").write_text(IPSET)
    refused = rayscan(workspace, "import", str(tmp_path / "a.ipset"), "--from", "2024-11-01")
    assert refused.exit_code == 1 and "addresses are pseudonyms here" in refused.stderr
    assert rayscan(workspace, "lookup", "192.0.2.1").exit_code == 1
    assert scanners(workspace, config()) is None
    with pytest.raises(DataError, match="addresses are pseudonyms here"):
        label_lists(workspace, config("evaluate.labels=scanners"))


def test_whose_labels_an_evaluation_takes(workspace: Workspace, tmp_path: Path) -> None:
    def store(label: str | None) -> pa.Table:
        rows = sequence_table([sequence(1, 74 << 24 | 120 << 16 | 14 << 8, label=label), sequence(2, 5)])
        key = {"period": "2024-03", "bucket": 0}
        table = workspace.table("sequences")
        table.replace([key], [table.write(rows, key)], {}, CommitInfo("r", ""))
        return rows

    unlabelled = store(None)
    assert label_lists(workspace, config()) is None
    with pytest.raises(DataError, match="none is imported"):
        label_lists(workspace, config("evaluate.labels=scanners"))
    (tmp_path / "a.ipset").write_text(IPSET)
    rayscan(workspace, "import", str(tmp_path / "a.ipset"), "--from", "2024-02-01")
    known = label_lists(workspace, config())  # auto: captures say nothing
    assert relabelled(unlabelled, known)["label"].to_pylist() == ["censys", None]
    assert label_lists(workspace, config("evaluate.labels=capture")) is None
    labelled = store("theirs")
    assert label_lists(workspace, config()) is None
    asked = label_lists(workspace, config("evaluate.labels=scanners"))
    assert relabelled(labelled, asked)["label"].to_pylist() == ["censys", None]
    assert relabelled(labelled, None) is labelled


def test_a_file_that_is_not_there(workspace: Workspace, tmp_path: Path) -> None:
    result = rayscan(workspace, "import", str(tmp_path / "nothing"), "--from", "2024-01-01")
    assert result.exit_code == ConfigError.exit_code
    assert "cannot read" in result.stderr
