"""The report of a workspace: one page for all periods, one for a single period, and the map that stays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_example import evaluation
from small_workspace import PERIODS, small_workspace

from rayscan import planning
from rayscan.config import ClusterConfig, RunConfig
from rayscan.errors import ConfigError
from rayscan.planning import Model
from rayscan.stages import report
from rayscan.tables import Workspace

pytestmark = pytest.mark.ray
MODEL = Model("m", "weights", {})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Workspace:
    made = small_workspace(tmp_path_factory.mktemp("report") / "ws")
    report.run(made, RunConfig(), MODEL, "1")
    return made


def blocks(workspace: Workspace, name: str) -> list[dict[str, Any]]:
    page = workspace.read_bytes(f"runs/main/{name}.html").decode()
    return [
        json.loads(text)
        for text in re.findall(r'<script type="application/json" id="\w+">(.*?)</script>', page)
    ]


def test_the_page_shows_what_the_tables_hold(workspace: Workspace) -> None:
    data, details = blocks(workspace, "report")
    assert data["periods"] == list(PERIODS)
    table = data["table"]
    assert len(table["sources"]) == 6 + 5 == len(details["said"])  # groups in each month
    assert [(event["gone"], event["merged"]) for event in data["events"]] == [(0, 0), (1, 1)]
    assert sorted(table["event"]) == ["born"] * 7 + ["continued"] * 4
    embedded = sum(file.rows for file in workspace.table("embeddings").files())
    assert data["points"]["n"] == embedded and data["points"]["strange"] == 0
    assert all(len(near) == 3 for near in details["near"])


def test_one_period_beside_the_report_on_all(workspace: Workspace) -> None:
    whole = workspace.read_bytes("runs/main/report.html")
    report.run(workspace, RunConfig(), MODEL, "1", PERIODS[1])
    data, _ = blocks(workspace, f"report-{PERIODS[1]}")
    assert data["periods"] == [PERIODS[1]] and set(data["table"]["period"]) == {PERIODS[1]}
    assert sorted(data["table"]["change"]) == ["+8%"] + ["as many"] * 3 + [
        "new"
    ]  # held against the month before
    assert workspace.read_bytes("runs/main/report.html") == whole
    with pytest.raises(ConfigError, match=r"has no period 2025; there are 2024-03, 2024-04"):
        report.run(workspace, RunConfig(), MODEL, "1", "2025")


def shown(workspace: Workspace) -> str:
    """The page as one line, without what scripts draw."""
    page = workspace.read_bytes("runs/main/report.html").decode().partition("<script")[0]
    return re.sub(r"\s+", " ", page)


def test_the_page_says_of_what_the_evaluation_is(workspace: Workspace) -> None:
    """Of which model, and whether of these clusters; thresholds are those of the present model."""
    config = RunConfig()
    found = {**evaluation(), "threshold": {"value": 0.9}, "config_hash": "evaluated with this"}
    now = planning.evaluation_version(workspace, config, MODEL)
    versions = []
    try:
        for facts, said in (
            ({"model": "m", "made_from": now}, None),
            ({"model": "m", "made_from": "older"}, "The evaluation is older than the model"),
            ({"model": "n", "made_from": "older"}, "The evaluation is of another model, n, and says nothing"),
        ):
            workspace.write_json("runs/main/evaluation.json", {**found, **facts})
            versions.append(planning.report_version(workspace, config, MODEL))
            report.run(workspace, config, MODEL, "1")
            page = shown(workspace)
            assert said in page if said else "The evaluation is" not in page
            assert "<code>evaluated with this</code>" in page and "<code>weights</code>" in page
            assert ("of model n</small>" in page) == (facts["model"] == "n")
            assert (
                "The threshold is" not in page
            )  # none is calibrated: that of the evaluation may be another's
    finally:
        Path(workspace.url("runs/main/evaluation.json")).unlink()
    assert versions[0] != versions[1] == versions[2]  # a version stands for the model as well
    given = RunConfig(cluster=ClusterConfig(threshold=0.25))
    report.run(workspace, given, MODEL, "1")
    assert "The threshold is 0.250, given in the configuration." in shown(workspace)


def test_the_map_is_drawn_once_a_model(workspace: Workspace) -> None:
    path = Path(workspace.url("models/m/map.parquet"))
    kept, points = path.read_bytes(), blocks(workspace, "report")[0]["points"]
    report.run(workspace, RunConfig(), MODEL, "2")
    assert path.read_bytes() == kept and blocks(workspace, "report")[0]["points"] == points
    shorter = pq.read_table(path).slice(0, 300)  # as if the map had been drawn when there was less
    pq.write_table(shorter, path)
    report.run(workspace, RunConfig(), MODEL, "3")
    drawn, placed = pq.read_table(path), blocks(workspace, "report")[0]["points"]
    assert drawn.num_rows == 300 and placed["n"] == points["n"]
    report.run(workspace, RunConfig(), Model("m", "other weights", {}), "4")
    again = pq.read_table(path)
    assert again.num_rows == points["n"] and np.isfinite(again["x"].to_numpy()).all()
