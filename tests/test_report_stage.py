"""The report of a workspace: one page for all periods, one for a single period, and the map that stays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_workspace import PERIODS, small_workspace

from rayscan.config import RunConfig
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
    assert len(table["sources"]) == 2 * 5 == len(details["said"])  # five groups in each month
    assert [event["gone"] for event in data["events"]] == [0, 1]
    assert sorted(table["event"]) == ["born"] * 6 + ["continued"] * 4
    embedded = sum(file.rows for file in workspace.table("embeddings").files())
    assert data["points"]["n"] == embedded and data["points"]["strange"] == 0
    assert all(len(near) == 3 for near in details["near"])


def test_one_period_beside_the_report_on_all(workspace: Workspace) -> None:
    whole = workspace.read_bytes("runs/main/report.html")
    report.run(workspace, RunConfig(), MODEL, "1", PERIODS[1])
    data, _ = blocks(workspace, f"report-{PERIODS[1]}")
    assert data["periods"] == [PERIODS[1]] and set(data["table"]["period"]) == {PERIODS[1]}
    assert sorted(data["table"]["change"]) == ["as many"] * 4 + ["new"]  # held against the month before
    assert workspace.read_bytes("runs/main/report.html") == whole
    with pytest.raises(ConfigError, match=r"has no period 2025; there are 2024-03, 2024-04"):
        report.run(workspace, RunConfig(), MODEL, "1", "2025")


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
