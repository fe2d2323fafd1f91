"""Looking at what came out, and taking it elsewhere: one campaign, one source, exports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from rayscan import config as configuration
from rayscan.cli.options import config_options, json_option, workspace_option


@click.group("show")
def show_group() -> None:
    """Show one campaign or one source in the terminal, as the report does."""


_period_option = click.option("--period", help="The period to tell of (default: the last it was there).")


@show_group.command("campaign")
@click.argument("name", metavar="ID")
@_period_option
@workspace_option
@config_options
@json_option
def show_campaign(
    name: str,
    period: str | None,
    workspace: str,
    preset: str,
    config_file: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show a campaign: over the periods, its ports, networks, neighbours and sources, and what it does.

    ID is its name or the beginning of it, as in the report.
    """
    config = configuration.load(preset, config_file, sets)
    from rayscan.stages import show
    from rayscan.tables import Workspace

    _show(show.campaign(Workspace.open(workspace), config, name, period), as_json)


@show_group.command("source")
@click.argument("address")
@workspace_option
@config_options
@json_option
def show_source(
    address: str, workspace: str, preset: str, config_file: Path | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Show a source: its flows and ports, its sequences in words, its campaigns, and who lists it.

    ADDRESS is an IPv4 address; in a workspace of pseudonyms it is one of these.
    """
    config = configuration.load(preset, config_file, sets)
    from rayscan.stages import show
    from rayscan.tables import Workspace

    found = show.source(Workspace.open(workspace), config, address)
    if not found["flows"]:
        click.echo(f"no flow of {address} is in {workspace}", err=True)
    _show(found, as_json)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    """Names and values below each other; lists of rows as tables."""
    if as_json:
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            console.print(escape(name))
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
            for column in value[0]:
                table.add_column(column)
            for row in value:
                table.add_row(*(escape(_text(cell)) for cell in row.values()))
            console.print(table)
        elif isinstance(value, list) and value and isinstance(value[0], str):
            console.print(escape(name))
            for text in value:
                console.print(f"  {escape(_one_line(text))}")
        else:
            console.print(f"{escape(name):<{width}}  {escape(_text(value))}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_one_line(str(key))} {_text(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list):
        return " ".join(_text(item) for item in value) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else _one_line(str(value))


def _one_line(text: str) -> str:
    """Texts of the data without what would move the cursor of a terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


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
    preset: str,
    config_file: Path | None,
    sets: tuple[str, ...],
) -> None:
    """Write campaigns and their sources for other programs.

    Campaigns of one sequence are left out. Where addresses are pseudonyms, a misp-warninglist and stix are
    refused, since they would accuse other people's addresses.

    \b
      rayscan export -w WS --format csv --table sources --out sources.csv
      rayscan export -w WS --format stix --campaign 2024-03-5f1c --out campaign.json
    """
    config = configuration.load(preset, config_file, sets)
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
