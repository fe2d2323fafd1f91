"""Lists of known scanners."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import click

from rayscan.cli.options import EPILOG, config_options, json_option, show_rows, workspace_option
from rayscan.config import RunConfig


@click.group("scanners")
def scanners_group() -> None:
    """Lists of known scanners, which the report and `evaluate.labels` name sources by.

    Lists age, so each entry is dated, and traffic is looked up with its own date: see the setting
    scanners.tolerance_days. A new list makes campaigns, evaluation and report stale, and nothing before.
    """


_DAY = click.DateTime(["%Y-%m-%d"])


@scanners_group.command("import", epilog=EPILOG)
@workspace_option
@click.argument("files", nargs=-1, required=True)
@click.option("--source", help="Whose list it is (default: the file's name; Parquet says it by itself).")
@click.option("--organisation", help="Who scans, where the list does not say, or in place of what it says.")
@click.option("--from", "valid_from", type=_DAY, help="First day for which the list vouches, YYYY-MM-DD.")
@click.option("--to", "valid_to", type=_DAY, help="Last such day (default: as --from).")
@json_option
def scanners_import(
    workspace: str,
    files: tuple[str, ...],
    source: str | None,
    organisation: str | None,
    valid_from: datetime | None,
    valid_to: datetime | None,
    as_json: bool,
) -> None:
    """Add lists of known scanners to a workspace.

    Read are ipset, plain addresses and CIDR, nftables sets, MISP warninglists, NICTER's JSON, and Parquet
    with columns net, len, org, source, as_of; also compressed. The content tells which. A list without a
    date of its own needs --from; a list that is there already changes nothing.

    \b
      rayscan scanners import -w WS censys.ipset --from 2024-11-01
      rayscan scanners import -w WS ranges.txt.gz --organisation shodan --from 2023-01-01 --to 2023-12-31
    """
    from rayscan.captures.scanner_lists import Given
    from rayscan.progress import say
    from rayscan.stages.lists import import_list
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    days = [None if day is None else day.date() for day in (valid_from, valid_to)]
    results = []
    for file in files:
        given = Given(source or Path(file).name, organisation, *days)
        made = import_list(opened, file, given)
        listed = made.listed
        results.append(
            {
                "file": file, "list": made.list, "new": made.new, "form": listed.form,
                "networks": listed.entries.num_rows, "ipv6": listed.ipv6,
                "excluded": listed.excluded, "bad": listed.bad,
            }
        )  # fmt: skip
        what = f"{listed.entries.num_rows:,} networks, dated by {listed.dates}"
        skipped = f"; {listed.ipv6:,} IPv6 networks left out" if listed.ipv6 else ""
        skipped += f"; {listed.excluded:,} exceptions (nomatch) left out" if listed.excluded else ""
        wrong = (
            f"; {listed.bad:,} are no network or have no date ({', '.join(listed.examples)})"
            if listed.bad
            else ""
        )
        state = "" if made.new else "; there already: nothing to do"
        say(f"{file}: list {made.list}, {listed.form}, {what}{skipped}{wrong}{state}")
    if as_json:
        click.echo(json.dumps(results, indent=1))
    new, bad = any(one["new"] for one in results), any(one["bad"] for one in results)
    sys.exit(3 if bad else 0 if new else 4)


@scanners_group.command("list")
@workspace_option
@json_option
def scanners_list(workspace: str, as_json: bool) -> None:
    """Show the lists of a workspace: networks, organisations, and the days for which they vouch."""
    from rayscan.stages.lists import overview
    from rayscan.tables import Workspace

    show_rows(overview(Workspace.open(workspace)).to_pylist(), as_json)


@scanners_group.command("remove")
@workspace_option
@click.argument("name", metavar="LIST")
def scanners_remove(workspace: str, name: str) -> None:
    """Take a list out of a workspace; `rayscan scanners list` shows the names."""
    from rayscan.progress import say
    from rayscan.stages.lists import remove_list
    from rayscan.tables import Workspace

    say(f"list {name}: {remove_list(Workspace.open(workspace), name):,} networks removed")


@scanners_group.command("lookup")
@workspace_option
@config_options
@click.argument("address")
@click.option("--date", "day", type=_DAY, help="Day of the traffic: show the entry that counts then.")
@json_option
def scanners_lookup(
    workspace: str, config: RunConfig, address: str, day: datetime | None, as_json: bool
) -> None:
    """Show which lists know an address: all entries, or with --date the one that counts on that day."""
    from rayscan.stages.lists import lookup
    from rayscan.tables import Workspace

    rows = lookup(Workspace.open(workspace), config, address, None if day is None else day.date())
    if not rows and not as_json:
        click.echo(f"no list knows {address}" + (" on that day" if day else ""), err=True)
        return
    show_rows(rows, as_json)
