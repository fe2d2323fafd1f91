"""What commands share: their stacks of options, the exit codes, and how they show rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial, wraps
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


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--preset, --config and --set; the function gets the settings that they make, as `config`."""

    @wraps(function)
    def with_config(
        *args: Any, preset: str, config_file: Path | None, sets: tuple[str, ...], **options: Any
    ) -> Any:
        return function(*args, config=configuration.load(preset, config_file, sets), **options)

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
        with_config = option(with_config)
    return with_config


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


def stage_options(function: Callable[..., Any], workspace_required: bool = True) -> Callable[..., Any]:
    options: list[Callable[[Any], Any]] = [
        partial(workspace_option, required=workspace_required),
        config_options,
        address_option,
        json_option,
        click.option("--dry-run", is_flag=True, help="Show what is due and change nothing."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def method_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--method, which is `train.method`; it stands above the options of settings."""

    @wraps(function)
    def with_method(*args: Any, method: str | None, sets: tuple[str, ...], **options: Any) -> Any:
        return function(*args, sets=sets if method is None else (*sets, f"train.method={method}"), **options)

    what = "Take this method in place of rayscan's encoder (train.method); docs/methods.md has their names."
    return click.option("--method", help=what)(with_method)


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
    from rayscan import terminal

    terminal.console().print(terminal.table_of(rows))
