"""Looking at what came out, and taking it elsewhere: one campaign, one source, exports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rayscan.cli.options import config_options, json_option, workspace_option
from rayscan.cli.workspace import settings_of
from rayscan.config import RunConfig


@click.group("show")
def show_group() -> None:
    """Show campaigns or one source in the terminal, as the report does.

    Without any settings, those of the last run `main` are taken. With report.show_sources=false no address
    and no network of a campaign is told.
    """


@show_group.command("campaigns")
@click.option("--period", help="The period to tell of.  [default: the newest]")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Most campaigns to list, those with the most sources first.",
)
@workspace_option
@config_options
@json_option
def show_campaigns(period: str | None, limit: int, workspace: str, config: RunConfig, as_json: bool) -> None:
    """List the campaigns of a period: how large, what they ask for, who they are, and what changed.

    What stands under `name` is enough of its name for `rayscan show campaign`.
    """
    from rayscan import terminal
    from rayscan.progress import say
    from rayscan.stages import show
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    found = show.campaigns(opened, settings_of(opened, config), period, limit)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    terminal.console().print(terminal.table_of([_told(row) for row in found["campaigns"]], _text))
    alone = f"; {found['alone']:,} sequences stayed alone" if found["alone"] else ""
    say(f"{len(found['campaigns']):,} of {found['of']:,} campaigns of {found['period']}{alone}")


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the list, with the three commonest ports and the short name alone."""
    ports = dict(list(row["ports"].items())[:3])
    return {name: value for name, value in row.items() if name != "campaign"} | {"ports": ports}


@show_group.command("campaign")
@click.argument("name", metavar="ID")
@click.option("--period", help="The period to tell of.  [default: the last it was there]")
@workspace_option
@config_options
@json_option
def show_campaign(
    name: str,
    period: str | None,
    workspace: str,
    config: RunConfig,
    as_json: bool,
) -> None:
    """Show a campaign: over the periods, its ports, networks, neighbours and sources, and what it does.

    ID is its name or the beginning of it, as in the report.
    """
    from rayscan.stages import show
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    _show(show.campaign(opened, settings_of(opened, config), name, period), as_json)


@show_group.command("source")
@click.argument("address")
@workspace_option
@config_options
@json_option
def show_source(address: str, workspace: str, config: RunConfig, as_json: bool) -> None:
    """Show a source: its flows and ports, its sequences in words, its campaigns, and who lists it.

    ADDRESS is an IPv4 address; in a workspace of pseudonyms it is one of these.
    """
    from rayscan.stages import show
    from rayscan.tables import Workspace

    opened = Workspace.open(workspace)
    found = show.source(opened, settings_of(opened, config), address)
    if not found["flows"]:
        click.echo(f"no flow of {address} is in {workspace}", err=True)
    _show(found, as_json)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    """Names and values below each other; lists of rows as tables. Of what is cut short, `of` how many."""
    if as_json:
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    from rayscan import terminal

    console = terminal.console()
    titles = {name: _title(name, value, facts["of"]) for name, value in facts.items() if name != "of"}
    width = max(len(title) for title in titles.values())
    for name, title in titles.items():
        value = facts[name]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            console.print(title)
            console.print(terminal.table_of(value, _text))
        elif isinstance(value, list) and value and isinstance(value[0], str):
            console.print(title)
            for text in value:
                console.print(f"  {terminal.one_line(text)}")
        else:
            console.print(f"{title:<{width}}  {_text(value)}")


def _title(name: str, value: Any, of: dict[str, int]) -> str:
    cut = name in of and len(value) < of[name]
    return f"{name}, {len(value)} of {of[name]:,}" if cut else name


def _text(value: Any) -> str:
    from rayscan.report import words
    from rayscan.terminal import one_line

    if isinstance(value, dict):
        return ", ".join(f"{one_line(str(key))} {_text(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list) and value and isinstance(value[0], int):
        return f"{words.bars(value)} at most {max(value):,}"
    if isinstance(value, list):
        return " ".join(_text(item) for item in value) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else one_line(str(value))


@click.command()
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(["csv", "parquet", "misp-warninglist", "stix", "graphml"]),
    help="What to write; docs/export.md says what each holds.",
)
@click.option(
    "--table",
    type=click.Choice(["campaigns", "sources"]),
    default="campaigns",
    show_default=True,
    help="csv, parquet: a row for each campaign, or for each source of each campaign.",
)
@click.option("--period", "periods", multiple=True, help="A period; may be repeated.  [default: the newest]")
@click.option("--campaign", "names", multiple=True, metavar="ID", help="A campaign; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write (default: stdout).")
@workspace_option
@config_options
def export(
    kind: Any,
    table: Any,
    periods: tuple[str, ...],
    names: tuple[str, ...],
    out: Path | None,
    workspace: str,
    config: RunConfig,
) -> None:
    """Write campaigns and their sources for other programs.

    Campaigns of one sequence are left out. Where addresses are pseudonyms, a misp-warninglist and stix are
    refused, since they would accuse other people's addresses.

    \b
      rayscan export -w WS --format csv --table sources --out sources.csv
      rayscan export -w WS --format stix --campaign 2024-03-5f1c --out campaign.json
    """
    from rayscan.errors import WorkspaceError
    from rayscan.progress import say
    from rayscan.stages import export as stage
    from rayscan.tables import Workspace

    if out is None and kind == "parquet" and sys.stdout.isatty():
        raise click.UsageError("Parquet is no text: give a file with --out")
    data, count = stage.run(Workspace.open(workspace), config, kind, table, periods, names)
    if out is None:
        sys.stdout.buffer.write(data)
    else:
        try:
            out.write_bytes(data)
        except OSError as error:
            raise WorkspaceError(f"cannot write {out}: {error.strerror}") from None
    where = "" if out is None else f" in {out}"
    say(f"export: {count:,} campaigns, {len(data):,} bytes of {kind}{where}")
