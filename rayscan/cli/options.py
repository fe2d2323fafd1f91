"""What commands share: their stacks of options, the exit codes, and how they show rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from rayscan import config as configuration
from rayscan.errors import STOPPED, RayscanError

F = TypeVar("F", bound=Callable[..., Any])

EPILOG = """\b
Exit codes: 0 done, 1 failed, 2 bad usage or configuration,
3 done but some inputs were rejected, 4 nothing to do, or another run is at it."""


class Guarded(click.Command):
    """Shows expected errors without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RayscanError as error:
            click.echo(f"rayscan: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("rayscan: stopped; what was committed stays, run again to go on", err=True)
            ctx.exit(130)
        except SystemExit as end:
            if end.code == STOPPED:
                click.echo("rayscan: stopped by SIGTERM; run again to go on from here", err=True)
            raise


def config_options(function: F) -> F:
    options = [
        click.option(
            "--preset",
            default="default",
            show_default=True,
            envvar="RAYSCAN_PRESET",
            help=f"Settings to start from: {', '.join(configuration.preset_names())}.",
        ),
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            envvar="RAYSCAN_CONFIG",
            help="YAML file of settings, over the preset.",
        ),
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="One setting, over everything else; may be repeated. `rayscan config schema` lists them.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def workspace_option(function: F, required: bool = True) -> F:
    return click.option(
        "-w",
        "--workspace",
        required=required,
        envvar="RAYSCAN_WORKSPACE",
        help="Folder or s3://bucket/prefix of the tables, models and reports.",
    )(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(
        function
    )


address_option = click.option(
    "--address",
    envvar="RAYSCAN_ADDRESS",
    help="Ray cluster to use (default: RAY_ADDRESS, else a local Ray is started).",
)


def stage_options(function: F, workspace_required: bool = True) -> F:
    options: list[Callable[[F], F]] = [
        partial(workspace_option, required=workspace_required),
        config_options,
        address_option,
        json_option,
        click.option("--dry-run", is_flag=True, help="Show what is due and change nothing."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


method_option = click.option(
    "--method",
    help="Take this method in place of rayscan's encoder (train.method); docs/methods.md has their names.",
)
model_option = click.option(
    "--model",
    help="Use this model: its id in the workspace, or a folder or s3:// prefix, which is copied there.",
)
from_option = click.option(
    "--from",
    "start",
    metavar="MODEL",
    help="Train on from this model (id or folder) instead of from random weights, and measure the drift.",
)


def show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=1, default=str))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, value in rows[0].items() if rows else ():
        table.add_column(name.replace("_", " "), justify="right" if isinstance(value, int) else "left")
    for row in rows:
        cells = (f"{value:,}" if isinstance(value, int) else escape(str(value)) for value in row.values())
        table.add_row(*cells)
    Console(soft_wrap=True).print(table)
