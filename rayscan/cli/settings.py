"""Showing, checking and describing settings."""

from __future__ import annotations

import json

import click

from rayscan.cli.options import config_options
from rayscan.config import RunConfig, as_yaml


@click.group("config")
def config_group() -> None:
    """Show, check and describe settings.

    Settings come, from weakest to strongest, from their defaults, a preset, a file, environment variables
    (RAYSCAN_TRAIN__STEPS=500) and --set train.steps=500.
    """


@config_group.command("show")
@config_options
def config_show(config: RunConfig) -> None:
    """Print the merged settings as YAML."""
    click.echo(as_yaml(config), nl=False)


@config_group.command("validate")
@config_options
def config_validate(config: RunConfig) -> None:
    """Check the settings; the exit code is 2 and the error names the setting if they are wrong."""
    from rayscan.planning import config_hash

    click.echo(f"the settings are valid; hash {config_hash(config)}", err=True)


@config_group.command("schema")
def config_schema() -> None:
    """Print the JSON schema of all settings, with descriptions, units and ranges."""
    click.echo(json.dumps(RunConfig.model_json_schema(), indent=1))
