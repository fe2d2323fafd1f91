"""What is done, due and stale, how the last run ended and how far behind it is.

Reads tables and small files, computes nothing, starts nothing and changes nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc

from rayscan import planning
from rayscan.config import RunConfig
from rayscan.lease import holders
from rayscan.planning import STAGES, Model, Unit, run_file
from rayscan.tables import Workspace


def health(workspace: Workspace, config: RunConfig) -> dict[str, Any]:
    """Everything a monitor may ask of a run; times are ISO 8601 UTC, durations seconds.

    `lag_s` is how old the newest flow is that has come as far as the campaigns; None before the first.
    """
    now = datetime.now(UTC)
    captures = workspace.table("captures").read()
    rejects = workspace.table("rejects").read(columns=["count"])
    campaigns = workspace.table("campaigns").read({"run": config.run}, ["period", "cluster", "last"])
    model = planning.find_model(workspace, config)
    last = workspace.read_json(run_file(config, "run.json"))
    changes = workspace.read_json(run_file(config, "changes.json")) or {}
    newest = pc.max(campaigns["last"]).as_py()
    period = pc.max(campaigns["period"]).as_py()
    here = campaigns.filter(pc.equal(campaigns["period"], period))
    return {
        "workspace": workspace.uri,
        "run": config.run,
        "time": now.isoformat(timespec="seconds"),
        "newest_flow": _iso(pc.max(captures["last"]).as_py()),
        "newest_flow_in_campaigns": _iso(newest),
        "newest_period": period,
        "lag_s": None if newest is None else round((now - newest).total_seconds()),
        "captures": captures.num_rows,
        "flows": pc.sum(captures["flows"]).as_py() or 0,
        "rejected": pc.sum(captures["rejects"]).as_py() or 0,
        "rejects": pc.sum(rejects["count"]).as_py() or 0,
        "sequences": sum(file.rows for file in workspace.table("sequences").files()),
        "clusters": len(here["cluster"].drop_null()),
        "model": None if model is None else model.id,
        "drift": changes.get("drift"),
        "last_run": last and {name: last[name] for name in _OF_LAST_RUN},
        "at_work": [{**one, **{k: _iso(one[k]) for k in _TIMES}} for one in holders(workspace)],
        "stages": status(workspace, config),
    }


_OF_LAST_RUN = ("run_id", "status", "exit_code", "error", "started", "finished")
_TIMES = ("taken", "renewed", "expires")


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds")


def plan(uri: str, config: RunConfig, model: Model | None = None) -> list[dict[str, Any]]:
    """`status` of a workspace that need not exist yet: then everything is due."""
    there = Workspace.at(uri)
    if there.facts() is not None:
        opened = Workspace.open(uri)
        return [*status(opened, config, model), _paper_row(opened, config, model)]
    files = planning.find_captures(config.captures, there.uri)
    later = [_status_row(stage, "", ["due"]) for stage in (*STAGES[1:], "paper")]
    return [_status_row("ingest", "", [file.state for file in files]), *later]


def status(workspace: Workspace, config: RunConfig, model: Model | None = None) -> list[dict[str, Any]]:
    """What is done, due and stale, one row per stage and period, with row counts.

    `model` is one that is not in the workspace yet, but would be brought in.
    """
    rows: list[dict[str, Any]] = []
    if config.captures.paths:
        files = planning.capture_units(workspace, config)
        flows = sum(_rows_by_period(workspace, "flows", {}).values())
        rows.append({**_status_row("ingest", "", [file.state for file in files]), "rows": flows})
    rows += _period_rows(
        "sequences", planning.sequence_units(workspace, config), _rows_by_period(workspace, "sequences", {})
    )
    model = model or planning.find_model(workspace, config)
    rows.append(_status_row("train", "", ["due" if model is None else "done"]))
    if model is None:
        return rows
    rows += _period_rows(
        "embed",
        planning.embed_units(workspace, model),
        _rows_by_period(workspace, "embeddings", {"model": model.id}),
    )
    rows += _period_rows(
        "cluster",
        planning.cluster_units(workspace, config, model),
        _rows_by_period(workspace, "clusters", {"run": config.run}),
    )
    rows += _period_rows(
        "campaigns",
        planning.campaign_units(workspace, config),
        _rows_by_period(workspace, "campaigns", {"run": config.run}),
    )
    evaluated = planning.evaluation_version(workspace, config, model)
    reported = planning.report_version(workspace, config, model)
    rows.append(_result_row(workspace, config, "evaluate", planning.EVALUATION, evaluated))
    rows.append(_result_row(workspace, config, "report", "report.json", reported))
    return rows


def _paper_row(workspace: Workspace, config: RunConfig, model: Model | None) -> dict[str, Any]:
    model = model or planning.find_model(workspace, config)
    wanted = "" if model is None else planning.paper_version(workspace, config, model)
    return _result_row(workspace, config, "paper", planning.PAPER, wanted)


def _result_row(
    workspace: Workspace, config: RunConfig, stage: str, name: str, wanted: str
) -> dict[str, Any]:
    """Status of a result that is one JSON file of the run and says what it was made from."""
    found = planning.version_of(workspace, run_file(config, name))
    return _status_row(stage, "", ["due" if found is None else "done" if found == wanted else "stale"])


def _period_rows(stage: str, units: list[Unit], counts: dict[str, int]) -> list[dict[str, Any]]:
    states: dict[str, list[str]] = {}
    for unit in units:
        states.setdefault(unit.key["period"], []).append(unit.state)
    return [
        {**_status_row(stage, period, found), "rows": counts.get(period, 0)}
        for period, found in sorted(states.items())
    ]


def _status_row(stage: str, period: str, states: list[str]) -> dict[str, Any]:
    counted = {name: states.count(name) for name in ("done", "due", "stale")}
    return {"stage": stage, "period": period, **counted, "rows": None}


def _rows_by_period(workspace: Workspace, table: str, where: dict[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for file in workspace.table(table).files(where):
        counts[file.key["period"]] = counts.get(file.key["period"], 0) + file.rows
    return counts
