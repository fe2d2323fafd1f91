"""Bringing the tables of an older rayscan to this one's version, and back.

What an upgrade may do is add columns that may be null: a commit of metadata, which rewrites no file, whatever
the table's size. Before it, the version of each table that changes is written down; going back is a commit
that brings those versions back, with the fingerprints they had, so that whatever was done since is due again.
That works for as long as `vacuum` has not deleted the files of these versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayscan import schema
from rayscan.errors import LeaseHeld, WorkspaceError
from rayscan.lease import holders
from rayscan.tables import TABLE_NAMES, CommitInfo, Workspace

_RECORD = "upgrades/{}.json"


@dataclass(frozen=True)
class Step:
    """What happens to one table."""

    table: str
    version: int  # before
    columns: list[str]  # added, or taken away again


def plan(workspace: Workspace) -> list[Step]:
    """What `upgrade` would do; changes nothing. Raises WorkspaceError and SchemaError if it cannot."""
    have = _version(workspace)
    if have > schema.VERSION:
        raise WorkspaceError(
            f"{workspace.uri} has tables of version {have}, newer than this rayscan's {schema.VERSION}: "
            "upgrade rayscan, or go back with the rayscan that made them"
        )
    lacking = {name: workspace.table(name).lacking() for name in TABLE_NAMES}
    return [
        Step(name, workspace.table(name).version(), columns) for name, columns in lacking.items() if columns
    ]


def is_current(workspace: Workspace) -> bool:
    return _version(workspace) == schema.VERSION


def upgrade(workspace: Workspace, steps: list[Step]) -> None:
    """Do what `plan` said. One that was killed is done again from the start."""
    _check_idle(workspace)
    have = _version(workspace)
    record = _RECORD.format(schema.VERSION)
    if workspace.read_json(record) is None:  # else one was killed: its versions are those from before
        tables = {step.table: {"version": step.version, "columns": step.columns} for step in steps}
        workspace.write_json(record, {"from": have, "to": schema.VERSION, "tables": tables})
    for step in steps:
        workspace.table(step.table).add_columns(step.columns)
    workspace.write_json("workspace.json", {**_facts(workspace), "schema_version": schema.VERSION})


def plan_back(workspace: Workspace) -> list[Step]:
    """What `back` would do; changes nothing. Raises WorkspaceError where there is no upgrade to undo."""
    record = workspace.read_json(_RECORD.format(_version(workspace)))
    if record is None:
        raise WorkspaceError(f"{workspace.uri} was not upgraded, so there is no way back")
    return [Step(name, one["version"], one["columns"]) for name, one in record["tables"].items()]


def back(workspace: Workspace, steps: list[Step]) -> None:
    """Undo the last upgrade, and what was done to its tables since."""
    _check_idle(workspace)
    path = _RECORD.format(_version(workspace))
    record = workspace.read_json(path) or {}
    for step in steps:
        workspace.table(step.table).restore(step.version, CommitInfo("upgrade", ""))
    workspace.write_json("workspace.json", {**_facts(workspace), "schema_version": record["from"]})
    workspace.remove(path)


def _facts(workspace: Workspace) -> dict[str, Any]:
    facts = workspace.facts()
    if facts is None:
        raise WorkspaceError(f"{workspace.uri} is no rayscan workspace (it has no workspace.json)")
    return facts


def _version(workspace: Workspace) -> int:
    return int(_facts(workspace).get("schema_version", 0))


def _check_idle(workspace: Workspace) -> None:
    if busy := holders(workspace):
        raise LeaseHeld(f"{busy[0]['owner']} is at work on {busy[0]['name']}; upgrade when it is done")
