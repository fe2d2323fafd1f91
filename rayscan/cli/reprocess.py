"""`reprocess`, which cron runs, and `switch`, which decides on the model of a run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from rayscan.cli.options import EPILOG, config_options, stage_options, workspace_option
from rayscan.cli.stages import execute
from rayscan.cli.workspace import settings_of
from rayscan.config import RunConfig


class _Moment(click.DateTime):
    """A day or a time, in UTC."""

    def __init__(self) -> None:
        super().__init__(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        return super().convert(value, param, ctx).replace(tzinfo=UTC)


since_option = click.option(
    "--since",
    type=_Moment(),
    help="Leave alone periods that end before this (UTC), and captures last changed before it.",
)
until_option = click.option(
    "--until", type=_Moment(), help="Leave alone periods that begin at this (UTC) or later."
)


@click.command(epilog=EPILOG)
@since_option
@until_option
@stage_options
def reprocess(since: datetime | None, until: datetime | None, **options: Any) -> None:
    """Take in new and changed captures, redo the periods they touch, and say what changed.

    Made for cron: finished work is never done twice, and while another run is at work this one ends at once
    with exit code 4. The model stays; how well it fits the new periods is measured (section `reprocess` says
    what follows). Prints the path of changes.json: which campaigns were born, have grown, split, merged or
    gone. Each period touched gets a report of its own. The evaluation is left to `rayscan evaluate`.

    \b
      rayscan reprocess -w s3://bucket/ws --config site.yaml --since 2024-03-01
    """
    from rayscan.planning import REPROCESS, Window

    execute(REPROCESS, window=Window(since, until), **options)


@click.command()
@click.argument("model")
@workspace_option
@config_options
def switch(model: str, workspace: str, config: RunConfig) -> None:
    """Let a run use another model from now on; the same command with the old one goes back.

    MODEL is an id of the workspace, or a folder, which is copied there. The next `run` or `reprocess` with
    these settings clusters with it; without any settings, those of the last run `main` are meant. While that
    run is at work nothing changes, and the exit code is 4. Try it beside the old one before, under another
    name:

    \b
      rayscan run -w WS --set run=next --model NEW
      rayscan switch NEW -w WS
    """
    from rayscan import models, planning
    from rayscan.lease import lease
    from rayscan.progress import say
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    config = settings_of(opened, config)
    found = models.named(opened, model)
    with lease(opened, f"run-{config.run}"):
        models.bring_in(opened, found)
        before = planning.switch_model(opened, config, found.model.id, "rayscan switch")
    say(f"run {config.run} uses model {found.model.id} from now on; before, it was {before}")
