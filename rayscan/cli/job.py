"""What the scripts in `jobs/` share: options, the settings logged first, and the exit codes of the commands.

Ray runs such a script on the cluster, with RAY_ADDRESS set; its output is the job's log. Submitted again it
goes on where it was, as every command does.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import click

from rayscan.cli.options import EPILOG, Guarded, config_options, workspace_option
from rayscan.config import RunConfig, as_yaml
from rayscan.tables import Workspace


def job(work: Callable[..., int]) -> click.Command:
    """A command line around `work(workspace, config, **options)`, which returns the exit code.

    The script's docstring is the help. Options besides the usual ones stand above, as for any command.
    """

    def run(workspace: str, config: RunConfig, **options: Any) -> None:
        begin(config)
        opened = Workspace.open(workspace, config.ingest if config.captures.paths else None)
        sys.exit(work(opened, config, **options))

    run.__click_params__ = getattr(work, "__click_params__", [])  # type: ignore[attr-defined]
    text = inspect.getdoc(inspect.getmodule(work))
    return click.command(cls=Guarded, help=text, epilog=EPILOG)(workspace_option(config_options(run)))


def begin(config: RunConfig) -> None:
    """Log what is about to be done: all settings, and their hash as in `run.json`."""
    from rayscan.planning import config_hash, versions
    from rayscan.progress import say

    say(as_yaml(config))
    say(", ".join(f"{name} {version}" for name, version in versions().items()))
    say(f"settings {config_hash(config)}")
