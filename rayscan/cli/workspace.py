"""Looking after a workspace: what is done and due, and what can be deleted."""

from __future__ import annotations

import json
from pathlib import Path
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
def status(
    workspace: str, preset: str, config_file: Path | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Show per stage and period what is done, due and stale, with row counts.

    Without any settings, those of the last run `main` are taken: what would running it again do?
    """
    from rayscan import pipeline
    from rayscan.tables import Workspace

    config = configuration.load(preset, config_file, sets)
    opened = Workspace.open(workspace)
    if config == configuration.load():
        config = _last_settings(opened, config)
    show_status(pipeline.status(opened, config), as_json)
    if not as_json:
        _show_last_run(opened, config)


def _last_settings(workspace: Workspace, config: RunConfig) -> RunConfig:
    """The settings of the last run of this name, or `config` where there was none."""
    from rayscan.planning import run_file

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


@click.command()
@workspace_option
@click.option(
    "--older-than",
    "hours",
    default=168.0,
    show_default=True,
    help="Hours a file must have been unused. Shorter than a running job endangers that job.",
)
@click.option("--dry-run", is_flag=True, help="List the files and delete none.")
def vacuum(workspace: str, hours: float, dry_run: bool) -> None:
    """Delete files that no table uses any more, leftovers of crashes too. Prints their paths."""
    from rayscan.tables import TABLE_NAMES, Workspace

    opened = Workspace.open(workspace)
    count = 0
    for name in TABLE_NAMES:
        for path in opened.table(name).vacuum(hours, dry_run):
            click.echo(f"{name}/{path}")
            count += 1
    click.echo(f"{count:,} files {'would be' if dry_run else 'were'} deleted", err=True)
