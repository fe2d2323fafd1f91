"""Exports against what the tables say, and against the tools that read them."""

from __future__ import annotations

import csv
import io
import ipaddress
import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import networkx as nx
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import stix2
from click.testing import CliRunner, Result
from report_example import GROUPS, NASTY
from small_workspace import NETWORK, PERIODS, small_workspace

from rayscan.cli import main
from rayscan.report import exports, words
from rayscan.tables import CommitInfo, Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return small_workspace(tmp_path_factory.mktemp("export") / "ws")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return small_workspace(tmp_path_factory.mktemp("export") / "hidden", addresses="cryptopan")


def export(workspace: Workspace, *words: str) -> Result:
    return CliRunner().invoke(main, ["export", "-w", workspace.uri, *words], catch_exceptions=False)


def expected(workspace: Workspace, period: str = PERIODS[-1]) -> dict[str, set[str]]:
    """Sources of each campaign of two sequences or more, by another way: a join of the tables."""
    clusters, campaigns = (
        pl.from_arrow(workspace.table(name).read({"run": "main", "period": period}))
        for name in ("clusters", "campaigns")
    )
    joined = clusters.join(campaigns.filter(pl.col("sequences") > 1), on="cluster")  # type: ignore[union-attr, arg-type]
    found: dict[str, set[str]] = {}
    for name, src in joined.select("campaign", "src").iter_rows():
        found.setdefault(name, set()).add(words.address(src))
    return found


def test_sources_as_csv(workspace: Workspace) -> None:
    result = export(workspace, "--format", "csv", "--table", "sources")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert list(rows[0]) == ["period", "campaign", "source", "sequences", "flows", "first", "last"]
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["campaign"], set()).add(row["source"])
    assert found == expected(workspace)
    campaigns = pl.from_arrow(workspace.table("campaigns").read({"run": "main", "period": PERIODS[-1]}))
    assert isinstance(campaigns, pl.DataFrame)
    flows = campaigns.filter(pl.col("sequences") > 1)["flows"].sum()
    assert sum(int(row["flows"]) for row in rows) == flows
    assert f"{len(found)} campaigns" in result.stderr


def test_campaigns_as_csv_and_parquet(workspace: Workspace, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(export(workspace, "--format", "csv").stdout)))
    assert len(rows) == len(GROUPS) - 1
    mirai = next(row for row in rows if row["mirai"] > "0.5")
    assert mirai["ports"].startswith(("23/tcp 0.5", "2323/tcp 0.5")) and mirai["labels"].startswith(
        "mirai-like "
    )
    assert not {"examples", "feature_sum"} & set(rows[0])
    path = tmp_path / "c.parquet"
    assert export(workspace, "--format", "parquet", "--period", PERIODS[0], "--out", str(path)).exit_code == 0
    table = pq.read_table(path)
    assert set(table["campaign"].to_pylist()) == set(expected(workspace, PERIODS[0]))
    assert {item["port"] for ports in table["ports"].to_pylist() for item in ports} > {23, 2323}


def test_warninglist(workspace: Workspace) -> None:
    """The fields and types of misp-warninglists' schema."""
    found = json.loads(export(workspace, "--format", "misp-warninglist").stdout)
    assert set(found) == {"name", "description", "version", "type", "matching_attributes", "list"}
    assert found["type"] == "cidr" and isinstance(found["version"], int)
    everybody = {str(ipaddress.ip_network(a)) for sources in expected(workspace).values() for a in sources}
    assert set(found["list"]) == everybody and len(found["list"]) == len(everybody)
    assert f"{words.address(NETWORK)[:-1]}" in found["list"][-1] or any(
        item.startswith("198.51.100.") for item in found["list"]
    )


def test_stix_is_what_stix2_reads(workspace: Workspace) -> None:
    text = export(workspace, "--format", "stix").stdout
    bundle = stix2.parse(text, allow_custom=False)
    sources = expected(workspace)
    campaigns = {item["id"]: item["name"] for item in bundle.objects if item["type"] == "campaign"}
    assert set(campaigns.values()) == set(sources)
    indicators = {item["id"]: item["pattern"] for item in bundle.objects if item["type"] == "indicator"}
    links = [item for item in bundle.objects if item["type"] == "relationship"]
    assert len(links) == len(sources)
    for link in links:
        name = campaigns[link["target_ref"]]
        listed = indicators[link["source_ref"]].removeprefix("[ipv4-addr:value IN (").removesuffix(")]")
        assert {part.strip("' ") for part in listed.split(",")} == sources[name]
    assert export(workspace, "--format", "stix").stdout == text


def test_graph_is_what_networkx_reads(workspace: Workspace) -> None:
    data = export(workspace, "--format", "graphml", "--period", PERIODS[0], "--period", PERIODS[1]).stdout
    graph: Any = nx.parse_graphml(data)
    both = [expected(workspace, period) for period in PERIODS]
    names = set(both[0]) | set(both[1])
    assert {n for n, facts in graph.nodes(data=True) if facts["kind"] == "campaign"} == names
    assert all(graph.nodes[n]["kind"] == "source" for _, sources in both[0].items() for n in sources)
    name = max(both[0], key=lambda n: len(both[0][n]))
    members = {n for n, _, kind in graph.in_edges(name, data="kind") if kind == "member"}
    assert members == both[0][name] | both[1].get(name, set())
    near = [(n, edge) for _, n, edge in graph.out_edges(name, data=True) if edge["kind"] == "near"]
    assert near and all(n in names and -1 <= edge["weight"] <= 1 for n, edge in near)


def graph_of(workspace: Workspace, *words: str) -> Any:
    return nx.parse_graphml(export(workspace, "--format", "graphml", *words).stdout)


def test_a_graph_tells_who_merged_and_split(workspace: Workspace) -> None:
    rows = workspace.table("campaigns").read({"run": "main", "period": PERIODS[1]}).to_pylist()
    (merged,) = [row for row in rows if row["event"] == "merged"]
    name, into = merged["campaign"], merged["relative"]
    both = graph_of(workspace, "--period", PERIODS[0], "--period", PERIODS[1])
    assert both.edges[name, into]["kind"] == "merged into"
    assert both.nodes[name]["period"] == PERIODS[0] and both.nodes[name]["sources"] > 0  # as it last was
    april = graph_of(workspace)
    assert april.edges[name, into]["kind"] == "merged into"
    assert april.nodes[name] == {"kind": "campaign"} and april.nodes[into]["period"] == PERIODS[1]
    assert len(graph_of(workspace, "--campaign", name)) == 2  # itself and where it went
    refused = export(workspace, "--format", "csv", "--campaign", name)
    assert refused.exit_code == 1 and "no campaign of these periods" in refused.stderr


def test_a_graph_has_no_nodes_of_unknown_kind(workspace: Workspace) -> None:
    """Where a campaign came from is told, though that one is not in the export."""
    rows = workspace.table("campaigns").read({"run": "main", "period": PERIODS[1]})
    rows = rows.filter(pc.greater(rows["sequences"], 1)).slice(0, 1).to_pylist()
    rows[0] |= {"event": "split", "relative": "2023-12-aa"}
    table = pa.Table.from_pylist(rows, workspace.table("campaigns").read({"period": PERIODS[1]}).schema)
    data = exports.as_graphml(table, exports.MEMBERS.empty_table(), "source")
    graph: Any = nx.parse_graphml(data.decode())
    assert graph.nodes["2023-12-aa"] == {"kind": "campaign"}
    assert graph.edges[rows[0]["campaign"], "2023-12-aa"]["kind"] == "split from"


def test_what_is_near_is_told_of_the_largest(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of 100,000 campaigns would take minutes: what is left out is said."""
    monkeypatch.setattr(exports, "MOST_NEAR", 2)
    result = export(workspace, "--format", "graphml")
    assert "among the 2 campaigns with the most sources of a period; there are up to 5" in result.stderr
    graph: Any = nx.parse_graphml(result.stdout)
    rows = workspace.table("campaigns").read({"run": "main", "period": PERIODS[1]})
    largest = rows.sort_by([("sources", "descending"), ("sequences", "descending")])["campaign"][:2]
    near = {(a, b) for a, b, kind in graph.edges(data="kind") if kind == "near"}
    assert near == {tuple(largest.to_pylist()), tuple(reversed(largest.to_pylist()))}


def test_stix_objects_are_created_once_and_change_with_their_content(tmp_path: Path) -> None:
    """Clustered again, a campaign is the same object, created when it was, and modified later."""
    workspace = small_workspace(tmp_path / "ws")
    first = json.loads(export(workspace, "--format", "stix").stdout)["objects"]
    table = workspace.table("campaigns")
    key = {"run": "main", "period": PERIODS[1]}
    rows = table.read(key).drop_columns(["run", "period"])
    networks = pa.array([n + 1 for n in rows["networks"].to_pylist()])
    rows = rows.set_column(rows.schema.get_field_index("networks"), "networks", networks)
    time.sleep(0.002)  # commits know milliseconds
    table.replace([key], [table.write(rows, key)], {}, CommitInfo("test", ""))
    again = {item["id"]: item for item in json.loads(export(workspace, "--format", "stix").stdout)["objects"]}
    began = {row["campaign"]: row["began"] for row in table.read(key).to_pylist()}
    for item in first[1:]:
        other = again[item["id"]]
        assert item["created"] == other["created"] <= item["modified"] < other["modified"]
        if item["type"] == "campaign":
            assert item["description"] != other["description"]
            assert item["created"] == item["first_seen"] == f"{began[item['name']]:%Y-%m-%dT%H:%M:%S.000Z}"
        if item["type"] == "indicator":
            ends = datetime.fromisoformat(item["valid_until"]) - datetime.fromisoformat(item["valid_from"])
            assert timedelta(30) < ends < timedelta(30 + 31)


def test_hostile_labels_stay_in_their_cell(workspace: Workspace) -> None:
    rows = workspace.table("campaigns").read({"run": "main", "period": PERIODS[0]}).slice(0, 1).to_pylist()
    nasty = [*NASTY, 'a,"b";\r\n=1+1', ":bomb: \\"]
    rows[0]["labels"] = [{"label": text, "sources": 1} for text in nasty]
    schema = workspace.table("campaigns").read({"period": PERIODS[0]}).schema
    text = exports.as_csv(exports.campaign_table(pa.Table.from_pylist(rows, schema))).decode()
    (found,) = csv.DictReader(io.StringIO(text, newline=""))
    assert found["labels"] == "; ".join(f"{label} 1" for label in nasty)


def test_labels_that_xml_cannot_hold(workspace: Workspace) -> None:
    campaigns = workspace.table("campaigns").read({"run": "main", "period": PERIODS[0]}).slice(0, 1)
    nasty = "a\x00<b>\ud7ff\x1b&\"'"
    place = campaigns.schema.get_field_index("labels")
    kind = campaigns.schema.field("labels").type
    campaigns = campaigns.set_column(place, "labels", [[[{"label": nasty, "sources": 1}]]]).cast(
        campaigns.schema.set(place, campaigns.schema.field("labels").with_type(kind))
    )
    data = exports.as_graphml(campaigns, exports.MEMBERS.empty_table(), "source")
    (_, facts), *_ = nx.parse_graphml(data.decode()).nodes(data=True)
    assert facts["labels"] == "a\ufffd<b>\ud7ff\ufffd&\"' 1"


def test_pseudonyms_never_pass_for_addresses(hidden: Workspace) -> None:
    for kind in ("stix", "misp-warninglist"):
        result = export(hidden, "--format", kind)
        assert result.exit_code == 1 and "pseudonyms" in result.stderr and not result.stdout
    header = export(hidden, "--format", "csv", "--table", "sources").stdout.splitlines()[0]
    assert "pseudonym" in header and "source" not in header.replace('"', "").split(",")
    graph: Any = nx.parse_graphml(export(hidden, "--format", "graphml").stdout)
    assert {facts["kind"] for _, facts in graph.nodes(data=True)} == {"campaign", "pseudonym"}


def test_one_campaign_and_what_is_not_there(workspace: Workspace) -> None:
    name = max(expected(workspace))
    rows = list(
        csv.DictReader(io.StringIO(export(workspace, "--format", "csv", "--campaign", name[:12]).stdout))
    )
    assert [row["campaign"] for row in rows] == [name]
    for more, said in (("--campaign", "no campaign"), ("--period", "has no period nowhere")):
        result = export(workspace, "--format", "csv", more, "nowhere")
        assert result.exit_code == 1 and said in result.stderr
