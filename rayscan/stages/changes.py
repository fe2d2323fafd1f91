"""What changed since the campaigns of a period were last looked at, for machines: `changes/<period>.json`.

The campaigns table keeps its versions for a while, so the last state of a period is read from there. Each
file says which state it describes: a run that was killed before it wrote one leaves it to the next.

`changes.json` holds all that the files of its periods hold, and is written before them. So a kill among them
shows, and the next run tells those periods again, together with its own.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rayscan import planning, schema
from rayscan.clustering import changes
from rayscan.config import RunConfig
from rayscan.errors import Gone
from rayscan.planning import Model, Unit, run_file
from rayscan.stages.cluster import find_threshold
from rayscan.tables import Workspace

_FOLDER, _SUMMARY = "changes", "changes.json"


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
    begun = _unfinished(workspace, config)
    told = {one["period"]: one for one in begun.get("periods", ())}
    due = {unit.name for unit in units}
    found: list[dict[str, Any]] = []
    before = ""
    for unit in planning.campaign_units(workspace, config):
        period = unit.key["period"]
        if told.get(period, {}).get("made_from") == unit.made_from:
            found.append(told[period])
        elif unit.name in due:
            state = {"made_from": unit.made_from, "table_version": now, "weights": model.weights}
            old = _last_state(workspace, config, unit, model, version)
            found.append(
                {"period": period, **_compare(workspace, config, period, before, old, threshold), **state}
            )
        before = period
    facts = {**facts, "drift": facts["drift"] or begun.get("drift"), "model": model.id, "periods": found}
    workspace.write_json(run_file(config, _SUMMARY), facts)
    for one in found:
        workspace.write_json(_path(config, one["period"]), one)
    return {kind: sum(len(one[kind]) for one in found) for kind in changes.KINDS}


def _compare(
    workspace: Workspace,
    config: RunConfig,
    period: str,
    before: str,
    old: list[dict[str, Any]] | None,
    threshold: float,
) -> dict[str, Any]:
    """What is to be told of a period against its last state; without one, against the period before."""
    new = _rows(workspace, config, period)
    if old is not None:
        return {"compared_with": "its last state", **changes.since_last_state(old, new, threshold)}
    earlier = _rows(workspace, config, before) if before else []
    against = before or "nothing: it is the first"
    return {"compared_with": against, **changes.since_period_before(earlier, new)}


def _unfinished(workspace: Workspace, config: RunConfig) -> dict[str, Any]:
    """`changes.json` of a run that was killed before all periods in it had their files; else empty."""
    last = workspace.read_json(run_file(config, _SUMMARY)) or {}
    for one in last.get("periods", ()):
        file = workspace.read_json(_path(config, one["period"])) or {}
        if "made_from" in one and file.get("made_from") != one["made_from"]:
            return last
    return {}


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
        with suppress(Gone):  # vacuumed meanwhile: that must not keep what follows from being told
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
