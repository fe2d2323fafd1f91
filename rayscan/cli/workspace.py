"""Looking after a workspace: what is done and due, and what can be deleted."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from rayscan import config as configuration
from rayscan.cli.options import config_options, json_option, workspace_option
from rayscan.config import RunConfig

if TYPE_CHECKING:
    from rayscan.tables import Workspace


@click.command()
@workspace_option
@config_options
@json_option
def status(workspace: str, config: RunConfig, as_json: bool) -> None:
    """Show per stage and period what is done, due and stale, with row counts.

    Without any settings, those of the last run `main` are taken: what would running it again do? With --json
    also what monitoring asks: how the last run ended, who is at work, how old the newest result is.
    """
    from rayscan.status import health
    from rayscan.status import status as states
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    config = settings_of(opened, config)
    if as_json:
        click.echo(json.dumps(health(opened, config), indent=1))
        return
    show_status(states(opened, config), False)
    _show_last_run(opened, config)


def settings_of(workspace: Workspace, config: RunConfig) -> RunConfig:
    """The settings given, or where none were given those of the last run `main`, if there was one."""
    from rayscan.planning import run_file

    if config != configuration.load():
        return config
    path = run_file(config, "config.yaml")
    try:
        return configuration.from_yaml(workspace.read_bytes(path).decode(), workspace.url(path))
    except FileNotFoundError:
        return config


def show_status(rows: list[dict[str, Any]], as_json: bool, stages: tuple[str, ...] | None = None) -> None:
    rows = [row for row in rows if stages is None or row["stage"] in stages]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("stage", "period"):
        table.add_column(name)
    for name in ("done", "due", "stale", "rows"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = [f"{row[name]:,}" if row[name] else "" for name in ("done", "due", "stale", "rows")]
        table.add_row(row["stage"], row["period"], *counts)
    Console(soft_wrap=True).print(table)


def _show_last_run(workspace: Workspace, config: RunConfig) -> None:
    from rayscan.planning import run_file

    last = workspace.read_json(run_file(config, "run.json"))
    if last is not None:
        error = f" ({last['error']})" if last["error"] else ""
        click.echo(
            f"\nlast run {last['run_id']}: {last['status']}{error}, finished {last['finished']}", err=True
        )


_HOURS_OF_A_RUN = 24


@click.command()
@workspace_option
@click.option(
    "--older-than",
    "hours",
    type=click.FloatRange(min=0),
    default=168.0,
    show_default=True,
    help="Hours a file must have been unused. Shorter than a running job endangers that job.",
)
@click.option("--dry-run", is_flag=True, help="List the files and delete none.")
def vacuum(workspace: str, hours: float, dry_run: bool) -> None:
    """Delete files that no table uses any more, leftovers of crashes too. Prints their paths."""
    from rayscan.errors import LeaseHeld
    from rayscan.lease import holders
    from rayscan.tables import TABLE_NAMES, Workspace

    opened = Workspace.open(workspace)
    if hours < _HOURS_OF_A_RUN and (busy := holders(opened)):
        raise LeaseHeld(
            f"{busy[0]['owner']} is at work on {busy[0]['name']}, and so short a time could take its files "
            f"away; wait, or give --older-than {_HOURS_OF_A_RUN} or more"
        )
    count = 0
    for name in TABLE_NAMES:
        for path in opened.table(name).vacuum(hours, dry_run):
            click.echo(f"{name}/{path}")
            count += 1
    click.echo(f"{count:,} files {'would be' if dry_run else 'were'} deleted", err=True)


@click.command()
@workspace_option
@click.argument("name", metavar="LEASE")
def unlock(workspace: str, name: str) -> None:
    """Take a lease away from a run that is known to be dead; the message that refuses a run names it.

    Hardly ever needed: the next run on the same machine sees that its process is gone, and from another
    machine a lease is taken over some eleven minutes after it was last renewed. A run that is still alive
    ends at its next commit, and can change nothing that another one has changed meanwhile. Where nobody
    holds that lease the exit code is 4.
    """
    from rayscan.lease import end, names
    from rayscan.progress import say
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    if name not in (there := names(opened)):
        say(f"nobody holds {name}; {'held are ' + ', '.join(there) if there else 'no lease is held'}")
        sys.exit(4)
    end(opened, name)
    say(f"{name} is free")


@click.command()
@workspace_option
@click.option("--dry-run", is_flag=True, help="Say what would be done and change nothing.")
@click.option("--back", is_flag=True, help="Undo the last upgrade, and what was done to its tables since.")
def upgrade(workspace: str, dry_run: bool, back: bool) -> None:
    """Bring the tables of an older rayscan to the version of this one.

    Columns are added that the old tables lack; no file is rewritten. The way back stays open until `vacuum`
    deletes the files of the versions before. Where nothing is to be done the exit code is 4.
    """
    from rayscan import schema
    from rayscan import upgrade as upgrades
    from rayscan.progress import say
    from rayscan.tables import Workspace

    place = Workspace.at(workspace)
    steps = upgrades.plan_back(place) if back else upgrades.plan(place)
    for step in steps:
        what = f"back to version {step.version}, without" if back else f"version {step.version} gets"
        say(f"{step.table}: {what} {', '.join(step.columns)}")
    if not back and not steps and upgrades.is_current(place):
        say(f"nothing to do: {place.uri} has tables of version {schema.VERSION}")
        sys.exit(4)
    if not dry_run:
        (upgrades.back if back else upgrades.upgrade)(place, steps)
