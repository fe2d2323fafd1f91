"""One campaign and one source in the terminal: the figures of the tables, or clear words."""

from __future__ import annotations

import json
from typing import Any

import pyarrow.compute as pc
import pytest
from click.testing import CliRunner, Result
from small_workspace import PERIODS, small_workspace

from rayscan.cli import main
from rayscan.report import words
from rayscan.tables import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return small_workspace(tmp_path_factory.mktemp("show") / "ws")


def show(workspace: Workspace, *words: str) -> Result:
    return CliRunner().invoke(main, ["show", *words, "-w", workspace.uri], catch_exceptions=False)


def largest(workspace: Workspace, period: str) -> dict[str, Any]:
    rows = workspace.table("campaigns").read({"run": "main", "period": period})
    found: dict[str, Any] = rows.sort_by([("sources", "descending")]).slice(0, 1).to_pylist()[0]
    return found


def test_a_campaign_over_the_periods_and_in_one(workspace: Workspace) -> None:
    row = largest(workspace, PERIODS[1])
    found = json.loads(show(workspace, "campaign", row["campaign"][:14], "--json").stdout)
    assert found["campaign"] == row["campaign"] and found["period"] == PERIODS[1]
    assert [item["event"] for item in found["periods"]] == ["born", "continued"]
    for name in ("sources", "networks", "sequences", "flows", "destinations"):
        assert found[name] == row[name]
    assert sum(found["flows by hour of the day"]) == row["flows"]
    assert found["networks /16"] == found["networks /8"] == 1
    assert found["largest networks"] == {"198.51.0.0/16": row["sources"]}
    assert len(found["typical sequences"]) == 3 and len(found["nearest"]) == 3
    march = json.loads(show(workspace, "campaign", row["campaign"], "--period", PERIODS[0], "--json").stdout)
    assert march["last flow"] < found["first flow"] or march["period"] == PERIODS[0]
    text = show(workspace, "campaign", row["campaign"]).stdout
    assert "23/tcp 0." in text and "typical sequences" in text and "continued" in text


def test_a_campaign_that_is_not_there(workspace: Workspace) -> None:
    for name, said in (("2024-", "campaigns begin with '2024-'"), ("nobody", "0 campaigns begin with")):
        result = show(workspace, "campaign", name)
        assert result.exit_code == 1 and said in result.stderr
    born = workspace.table("campaigns").read({"run": "main", "period": PERIODS[1]})
    name = born.filter(pc.and_(pc.equal(born["event"], "born"), pc.greater(born["size"], 1)))["campaign"][
        0
    ].as_py()
    result = show(workspace, "campaign", name, "--period", PERIODS[0])
    assert (
        result.exit_code == 1
        and f"has no cluster in {PERIODS[0]}; it has one in {PERIODS[1]}" in result.stderr
    )


def test_a_source_with_its_campaigns(workspace: Workspace) -> None:
    flows = workspace.table("flows").read()
    clusters = workspace.table("clusters").read({"run": "main", "period": PERIODS[0]})
    src = clusters["src"][0].as_py()
    found = json.loads(show(workspace, "source", words.address(src), "--json").stdout)
    own = flows.filter(pc.equal(flows["src"], src))
    assert found["flows"] == own.num_rows and not found["is a pseudonym"]
    assert found["first flow"] == words.instant(pc.min(own["ts"]).as_py())
    assert sum(found["ports"].values()) == pytest.approx(1)
    mine = clusters.filter(pc.equal(clusters["src"], src)).num_rows
    assert sum(row["sequences"] for row in found["campaigns"] if row["period"] == PERIODS[0]) == mine
    assert found["campaigns"][0]["campaign"] == largest(workspace, PERIODS[0])["campaign"]
    assert found["marks"]["Mirai"] == 1.0 and found["scanner lists"] == []
    assert "flows within" in show(workspace, "source", words.address(src)).stdout


def test_a_source_that_never_came(workspace: Workspace) -> None:
    result = show(workspace, "source", "192.0.2.1", "--json")
    assert result.exit_code == 0 and "no flow of 192.0.2.1" in result.stderr
    found = json.loads(result.stdout)
    assert (found["flows"], found["campaigns"], found["ports"]) == (0, [], {})
    assert show(workspace, "source", "example.org").exit_code == 2
