"""The command line: each command a few lines over `pipeline.py`, one module a topic.

Text for people goes to stderr, data to stdout. Exit codes: 0 done, 1 failed, 2 bad usage or configuration,
3 done but some inputs were rejected, 4 nothing to do, or another run is at it. Heavy libraries are imported
when a command needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import click

import rayscan
from rayscan.cli import captures, cluster, methods, reprocess, scanners, settings, show, stages, workspace
from rayscan.cli.options import EPILOG, Guarded


class _Group(Guarded, click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the pipeline


@click.group(cls=_Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rayscan.__version__, prog_name="rayscan")
def main() -> None:
    """Which sources of a network telescope behave alike, and who belongs to one campaign.

    `rayscan run` does everything that is due, from captures to a report, and nothing twice. The commands
    named after a stage do that stage alone. Try it on simulated traffic:

    \b
      rayscan simulate /tmp/telescope
      rayscan run -w /tmp/ws --preset quick --set captures.paths=/tmp/telescope/captures
    """


for command in (
    captures.simulate,
    stages.run_command,
    reprocess.reprocess,
    captures.ingest,
    captures.inspect,
    stages.sequences,
    stages.train,
    stages.tune,
    stages.embed,
    cluster.cluster,
    stages.campaigns,
    stages.evaluate,
    methods.compare,
    stages.report,
    show.show_group,
    show.export,
    methods.clan,
    methods.graphs,
    workspace.status,
    reprocess.switch,
    workspace.vacuum,
    workspace.unlock,
    workspace.upgrade,
    scanners.scanners_group,
    settings.config_group,
):
    main.add_command(command)
