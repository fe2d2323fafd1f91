"""What changed since the campaigns of a period were last looked at, for machines: `changes/<period>.json`.

The campaigns table keeps its versions for a while, so the last state of a period is read from there. Each
file says which state it describes: a run that was killed before it wrote one leaves it to the next.
"""

from __future__ import annotations

from typing import Any

from rayscan import planning, schema
from rayscan.clustering import changes
from rayscan.config import RunConfig
from rayscan.planning import Model, Unit, run_file
from rayscan.stages.cluster import find_threshold
from rayscan.tables import Workspace

_FOLDER = "changes"


def due(workspace: Workspace, config: RunConfig) -> list[Unit]:
    """Periods whose campaigns are others than their changes say."""
    units = planning.campaign_units(workspace, config)
    return [unit for unit in units if _described(workspace, config, unit).get("made_from") != unit.made_from]


def run(
    workspace: Workspace,
    config: RunConfig,
    model: Model,
    units: list[Unit],
    version: int,
    facts: dict[str, Any],
) -> dict[str, int]:
    """Write the changes of these periods, and all of them to `changes.json`, with `facts` on top.

    `version` is that of the campaigns table before this run. Returns how many campaigns changed how.
    """
    now = workspace.table("campaigns").version()
    threshold, _ = find_threshold(workspace, config, model)
    periods = [unit.key["period"] for unit in planning.campaign_units(workspace, config)]
    found = []
    for unit in units:
        period = unit.key["period"]
        new = _rows(workspace, config, period)
        old = _last_state(workspace, config, unit, model, version)
        if old is not None:
            told = {"compared_with": "its last state", **changes.since_last_state(old, new, threshold)}
        else:
            place = periods.index(period)
            before = _rows(workspace, config, periods[place - 1]) if place else []
            against = periods[place - 1] if place else "nothing: it is the first"
            told = {"compared_with": against, **changes.since_period_before(before, new)}
        found.append({"period": period, **told})
        state = {"made_from": unit.made_from, "table_version": now, "weights": model.weights}
        workspace.write_json(_path(config, period), {**state, **found[-1]})
    workspace.write_json(run_file(config, "changes.json"), {**facts, "model": model.id, "periods": found})
    return {kind: sum(len(told[kind]) for told in found) for kind in changes.KINDS}


def _path(config: RunConfig, period: str) -> str:
    return run_file(config, f"{_FOLDER}/{period}.json")


def _described(workspace: Workspace, config: RunConfig, unit: Unit) -> dict[str, Any]:
    return workspace.read_json(_path(config, unit.key["period"])) or {}


def _last_state(
    workspace: Workspace, config: RunConfig, unit: Unit, model: Model, version: int
) -> list[dict[str, Any]] | None:
    """Campaigns of a period as they were last described; None if never, or no version of the table has them.

    Those of another model are of no use: feature sums of two models cannot be compared.
    """
    last = _described(workspace, config, unit)
    if last.get("weights") != model.weights:
        return None
    table = workspace.table("campaigns")
    for one in (version, int(last["table_version"])):
        if one >= 0 and table.done([unit.key], one)[unit.name] == last["made_from"]:
            return _rows(workspace, config, unit.key["period"], one)
    return None


def _rows(
    workspace: Workspace, config: RunConfig, period: str, version: int | None = None
) -> list[dict[str, Any]]:
    where = {"run": config.run, "period": period}
    rows: list[dict[str, Any]] = (
        workspace.table("campaigns").read(where, schema.CAMPAIGNS.names, version).to_pylist()
    )
    return sorted(rows, key=lambda row: row["campaign"])
