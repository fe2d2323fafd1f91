"""One campaign and one source in the terminal: the figures of the tables, or clear words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import report_example
from click.testing import CliRunner, Result
from small_workspace import PERIODS, small_workspace

from rayscan.cli import main
from rayscan.cli.options import show_rows
from rayscan.progress import say
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


def test_the_campaigns_of_a_period(workspace: Workspace) -> None:
    rows = workspace.table("campaigns").read({"run": "main", "period": PERIODS[1]})
    rows = rows.filter(pc.greater(rows["sequences"], 1))
    order = [("sources", "descending"), ("sequences", "descending")]
    listed = json.loads(show(workspace, "campaigns", "--json").stdout)
    assert (listed["period"], listed["of"], listed["alone"]) == (PERIODS[1], 5, 40)
    assert [row["campaign"] for row in listed["campaigns"]] == rows.sort_by(order)["campaign"].to_pylist()
    assert {row["change"] for row in listed["campaigns"]} == {"+8%", "as many", "new"}
    first = listed["campaigns"][0]
    assert first["labels"] == {"mirai-like": first["sources"]} and "known scanners" not in first
    again = json.loads(show(workspace, "campaign", first["name"], "--json").stdout)
    assert again["campaign"] == first["campaign"]  # the short name is enough
    march = show(workspace, "campaigns", "--period", PERIODS[0], "--limit", "2")
    assert len(march.stdout.splitlines()) == 3 and f"2 of 6 campaigns of {PERIODS[0]}" in march.stderr
    assert "40 sequences stayed alone" in march.stderr
    assert all(row["name"] in show(workspace, "campaigns").stdout for row in listed["campaigns"])
    wrong = show(workspace, "campaigns", "--period", "2025")
    assert wrong.exit_code == 1 and "has no period 2025; there are 2024-03, 2024-04" in wrong.stderr


def test_activity_is_drawn_and_cut_lists_say_so(workspace: Workspace) -> None:
    row = largest(workspace, PERIODS[1])
    found = json.loads(show(workspace, "campaign", row["campaign"], "--json").stdout)
    line = found["flows over time"]
    assert line["each"] == "1 day" and line["from"] == f"{row['first']:%Y-%m-%d} 00:00:00 UTC"
    assert sum(line["flows"]) == row["flows"] and len(line["flows"]) == (row["last"] - row["first"]).days + 1
    assert found["of"]["examples"] == row["sources"] and found["of"]["nearest"] == 4
    text = show(workspace, "campaign", row["campaign"]).stdout
    cut = (f"examples, 20 of {row['sources']}", "nearest, 3 of 4", f"3 of {row['sequences']}", "6 of 256")
    assert all(said in text for said in cut)
    assert f"{words.bars(line['flows'])} at most {max(line['flows']):,}" in text
    assert words.bars([0, 1, 4, 8, 0]) == "·▁▄█·" and words.bars([]) == ""


def test_addresses_are_withheld_as_in_the_report(workspace: Workspace) -> None:
    """Also where the settings of the last run say so, and none are given here."""
    name = largest(workspace, PERIODS[1])["campaign"]
    address = re.compile(r"\b\d{1,3}(\.\d{1,3}){3}\b")
    assert address.search(show(workspace, "campaign", name, "--json").stdout)
    hidden = show(workspace, "campaign", name, "--set", "report.show_sources=false", "--json").stdout
    assert not address.search(hidden) and "typical sequences" in hidden
    workspace.write_bytes("runs/main/config.yaml", b"report:\n  show_sources: false\n")
    try:
        text = show(workspace, "campaign", name).stdout
    finally:
        workspace.delete("runs/main/config.yaml")
    assert not address.search(text) and "withheld" in text


def test_places_are_named(workspace: Workspace, tmp_path: Path) -> None:
    name = largest(workspace, PERIODS[1])["campaign"]
    (tmp_path / "pfx2as").write_text("198.51.100.0\t25\t64500\n198.51.100.128\t25\t64501\n")
    asked = ("--set", f"report.pfx2as={tmp_path / 'pfx2as'}", "--json")
    found = json.loads(show(workspace, "campaign", name, *asked).stdout)
    assert set(found["Autonomous systems"]) == {"AS64500", "AS64501"}
    assert sum(found["Autonomous systems"].values()) == found["sources"]
    one = json.loads(show(workspace, "source", "198.51.100.130", *asked).stdout)
    assert one["Autonomous systems"] == "AS64501"


NASTY = (":bomb: trailing\\", "[red]x[/red]", "[/nope]", "up\x1b[1Aone\nline\u202e")


@pytest.mark.parametrize("label", NASTY)
def test_hostile_labels_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    names = [name for *_, name, _ in report_example.GROUPS]
    groups = tuple(
        (*group[:3], label if name == "mirai-like" else name, group[4])
        for group, name in zip(report_example.GROUPS, names, strict=True)
    )
    monkeypatch.setattr(report_example, "GROUPS", groups)
    workspace = small_workspace(tmp_path / "ws")
    name = largest(workspace, PERIODS[1])["campaign"]
    src = words.address(workspace.table("clusters").read({"period": PERIODS[0]})["src"][0].as_py())
    plain = label.replace("\x1b", " ").replace("\n", " ").replace("\u202e", " ")
    for asked in (("campaigns",), ("campaign", name), ("source", src)):
        text = show(workspace, *asked).stdout
        assert f"{plain} " in text and not {"\x1b", "\u202e"} & set(text)


def test_rows_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Lists of scanners, and what is said on the way, come from outside as labels do."""
    show_rows([{"source": text, "networks": 1_000} for text in NASTY], False)
    say(NASTY[3])
    seen = capsys.readouterr()
    assert all(text in seen.out for text in NASTY[:3]) and "1,000" in seen.out
    assert seen.err == "up [1Aone\nline \n" and "\x1b" not in seen.out
