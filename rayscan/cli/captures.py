"""Commands on captures: simulate them, look into them, read them in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click

from rayscan.cli.options import EPILOG, config_options, json_option, stage_options
from rayscan.cli.stages import execute
from rayscan.config import RunConfig


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--months", default=3, show_default=True, help="Months of traffic.")
@click.option("--start", default="2024-01-01", show_default=True, help="First day, UTC.")
@click.option("--sources", default=2000, show_default=True, help="Sources over all months.")
@click.option("--flows", default=500_000, show_default=True, help="Flows over all months.")
@click.option("--prefix", default="198.18.0.0/16", show_default=True, help="The telescope's addresses.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option("--every", type=click.Choice(["month", "day"]), default="month", help="One file a ...")
@click.option("--pcap", is_flag=True, help="Write packet captures instead of Parquet.")
@json_option
def simulate(folder: Path, as_json: bool, **options: Any) -> None:
    """Write captures of a telescope whose campaigns are known, into FOLDER.

    FOLDER/captures is what to ingest. FOLDER/truth.parquet says which source belongs to which campaign.
    """
    from rayscan.progress import say, track
    from rayscan.simulate import simulate_to

    with track("simulate", options["flows"], "flows") as advance:
        done = 0

        def progress(file: str, written: int, _: int) -> None:
            nonlocal done
            advance(written - done, file)
            done = written

        made = simulate_to(folder, **options, progress=progress)
    say(
        f"simulate: {made.flows:,} flows of {made.sources:,} sources in {made.campaigns} campaigns, "
        f"{len(made.files)} files, {made.bytes / 1e6:,.1f} MB"
    )
    if as_json:
        facts = {name: getattr(made, name) for name in ("flows", "sources", "campaigns", "bytes")}
        facts |= {"captures": str(made.captures), "truth": str(made.truth)}
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(made.captures)


def captures_argument(function: Callable[..., Any], required: bool = False) -> Callable[..., Any]:
    """CAPTURES and --format, for `captures.paths` and `captures.format`; above the options of settings."""

    @wraps(function)
    def with_captures(
        *args: Any,
        captures: tuple[str, ...],
        capture_format: str | None,
        sets: tuple[str, ...],
        **options: Any,
    ) -> Any:
        if captures:
            sets += (f"captures.paths={json.dumps(captures, ensure_ascii=False)}",)
        if capture_format is not None:
            sets += (f"captures.format={capture_format}",)
        return function(*args, sets=sets, **options)

    what = "Format of all captures, where their content is ambiguous (captures.format).  [default: auto]"
    with_format = click.option("--format", "capture_format", help=what)(with_captures)
    return click.argument("captures", nargs=-1, required=required)(with_format)


@click.command(epilog=EPILOG)
@captures_argument
@stage_options
def ingest(**options: Any) -> None:
    """Read captures into the flows table.

    CAPTURES are files, folders, s3:// prefixes or quoted patterns, in place of captures.paths. A capture is
    known by its content: given twice it counts once, corrected it replaces the old one. What cannot be read
    is counted in the rejects table, and the exit code is 3.

    \b
      rayscan ingest -w /data/ws '/data/telescope/2024-*/**/*.pcap.gz'
      rayscan ingest -w s3://bucket/ws s3://bucket/telescope/2024-03 --format csv
    """
    execute(("ingest",), **options)


@click.command()
@click.option("--rows", type=click.IntRange(min=1), help="Stop after about this many rows of each capture.")
@partial(captures_argument, required=True)
@config_options
@json_option
def inspect(config: RunConfig, rows: int | None, as_json: bool) -> None:
    """Show what captures hold and how they are read, without ingesting them.

    CAPTURES as for `rayscan ingest`. Of one, everything is shown: format, time span, rejects, addresses,
    ports, and which columns it records or lacks; of several, a line each and then all of them together. The
    exit code is 3 if something could not be read.
    """
    from rayscan import inspect as inspection
    from rayscan.planning import find_captures
    from rayscan.progress import track

    files = find_captures(config.captures)
    results = []
    with track("inspect", len(files), "captures") as advance:
        for result in inspection.inspect(files, config, rows):
            results.append(result)
            advance(1, result.path)
    if as_json:
        facts = {"captures": [result.facts() for result in results]}
        click.echo(json.dumps({**facts, "together": inspection.together(results).facts()}, indent=1))
    else:
        inspection.show(results)
    sys.exit(0 if all(result.whole for result in results) else 3)
