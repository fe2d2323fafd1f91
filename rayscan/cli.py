"""The command line: each command a few lines over `pipeline.py`.

Text for people goes to stderr, data to stdout. Exit codes: 0 done, 1 failed, 2 bad usage or configuration,
3 done but some inputs were rejected, 4 nothing to do. Heavy libraries are imported when a command needs them,
so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import rayscan
from rayscan import config as configuration
from rayscan.config import RunConfig
from rayscan.errors import RayscanError

if TYPE_CHECKING:
    from rayscan.tables import Workspace

F = TypeVar("F", bound=Callable[..., Any])

_EPILOG = """\b
Exit codes: 0 done, 1 failed, 2 bad usage or configuration,
3 done but some inputs were rejected, 4 nothing to do."""


class _Group(click.Group):
    """Shows expected errors without a traceback, and suggests the nearest command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RayscanError as error:
            click.echo(f"rayscan: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("rayscan: stopped; what was committed stays, run again to go on", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the pipeline


@click.group(cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rayscan.__version__, prog_name="rayscan")
def main() -> None:
    """Which sources of a network telescope behave alike, and who belongs to one campaign.

    `rayscan run` does everything that is due, from captures to a report, and nothing twice. The commands
    named after a stage do that stage alone. Try it on simulated traffic:

    \b
      rayscan simulate /tmp/telescope
      rayscan run -w /tmp/ws --preset quick --set captures.paths=/tmp/telescope/captures
    """


def _config_options(function: F) -> F:
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


def _workspace_option(function: F, required: bool = True) -> F:
    return click.option(
        "-w",
        "--workspace",
        required=required,
        envvar="RAYSCAN_WORKSPACE",
        help="Folder or s3://bucket/prefix of the tables, models and reports.",
    )(function)


def _json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(
        function
    )


def _stage_options(function: F, workspace_required: bool = True) -> F:
    options: list[Callable[[F], F]] = [
        partial(_workspace_option, required=workspace_required),
        _config_options,
        click.option(
            "--address",
            envvar="RAYSCAN_ADDRESS",
            help="Ray cluster to use (default: RAY_ADDRESS, else a local Ray is started).",
        ),
        _json_option,
        click.option("--dry-run", is_flag=True, help="Show what is due and change nothing."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


# ---------------------------------------------------------------------------------------------
# a telescope to try things on
# ---------------------------------------------------------------------------------------------


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--months", default=3, show_default=True, help="Months of traffic.")
@click.option("--start", default="2024-01-01", show_default=True, help="First day, UTC.")
@click.option("--sources", default=2000, show_default=True, help="Sources over all months.")
@click.option("--flows", default=500_000, show_default=True, help="Flows over all months.")
@click.option("--prefix", default="198.18.0.0/16", show_default=True, help="The telescope's addresses.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal bytes.")
@click.option("--every", type=click.Choice(["month", "day"]), default="month", help="One file a ...")
@click.option("--pcap", is_flag=True, help="Write packet captures instead of Parquet.")
@_json_option
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


# ---------------------------------------------------------------------------------------------
# run and its stages
# ---------------------------------------------------------------------------------------------


def _execute(
    stages: tuple[str, ...],
    workspace: str,
    preset: str,
    config_file: Path | None,
    sets: tuple[str, ...],
    address: str | None,
    as_json: bool,
    dry_run: bool,
    fresh: bool = False,
) -> None:
    config = configuration.load(preset, config_file, sets)
    from rayscan import pipeline, planning
    from rayscan.tables import Workspace

    if dry_run:
        _show_status(pipeline.plan(workspace, config), as_json, stages)
        return
    if config.captures.paths:
        planning.find_captures(config.captures, workspace)  # says what is missing before anything is made
    opened = Workspace.open(workspace, config.ingest if config.captures.paths else None)
    outcome = pipeline.Run(opened, config, address).execute(stages, fresh)
    if outcome.exit_code == pipeline.NOTHING_TO_DO:
        click.echo(f"nothing to do: everything in {opened.uri} is up to date", err=True)
    if as_json:
        click.echo(json.dumps(asdict(outcome), indent=1))
    elif "report" in stages and outcome.report:
        click.echo("the report:", err=True)
        click.echo(outcome.report)
    sys.exit(outcome.exit_code)


@main.command("run", epilog=_EPILOG)
@_stage_options
def run_command(**options: Any) -> None:
    """Do everything that is due, from captures to the report.

    Finished work is never done twice: run it again after a crash, after new captures, or with other
    settings, and only what they touch is done.
    """
    from rayscan.planning import STAGES

    _execute(STAGES, **options)


@main.command(epilog=_EPILOG)
@_stage_options
def ingest(**options: Any) -> None:
    """Read captures into the flows table.

    A capture is known by its content: given twice it counts once, corrected it replaces the old one. What
    cannot be read is counted in the rejects table, and the exit code is 3.
    """
    _execute(("ingest",), **options)


@main.command(epilog=_EPILOG)
@_stage_options
def sequences(**options: Any) -> None:
    """Cut each source's flows into sequences."""
    _execute(("sequences",), **options)


@main.command(epilog=_EPILOG)
@click.option("--fresh", is_flag=True, help="Train again, in place of the model that these settings have.")
@_stage_options
def train(**options: Any) -> None:
    """Train the encoder on sequences, without labels.

    A killed training goes on from its last checkpoint when it is started again.
    """
    _execute(("train",), **options)


@main.command(epilog=_EPILOG)
@_stage_options
def embed(**options: Any) -> None:
    """Turn every sequence into a vector with the trained model."""
    _execute(("embed",), **options)


@main.command(epilog=_EPILOG)
@click.argument("vectors", type=click.Path(path_type=Path), required=False)
@click.option("--threshold", default="auto", show_default=True, help="VECTORS: a similarity, or auto.")
@click.option("--sweep", help="VECTORS: thresholds start:stop:step, or a list 0.2,0.4.")
@click.option("--out", type=click.Path(path_type=Path), help="VECTORS: Parquet file of labels to write.")
@click.option("--group", default="src", show_default=True, help="VECTORS: for auto, column of known groups.")
@click.option("--normalise", is_flag=True, help="VECTORS: divide each by its length first.")
@click.option("--seed", default=0, show_default=True, help="VECTORS: seed of the search.")
@partial(_stage_options, workspace_required=False)
def cluster(vectors: Path | None, **options: Any) -> None:
    """Group sequences by correlation clustering: each period's, or the rows of a file.

    Without VECTORS, the periods of a workspace (settings: section `cluster`). With VECTORS, the rows of a
    Parquet file with a list column `vector`, or of a .npy matrix; no workspace is needed:

    \b
      rayscan cluster vectors.parquet --threshold 0.4 --out labels.parquet
      rayscan cluster vectors.npy --sweep 0:1:0.01 --json
    """
    names = ("threshold", "sweep", "out", "group", "normalise", "seed")
    of_file = {name: options.pop(name) for name in names}
    if vectors is not None:
        _cluster_file(vectors, as_json=options["as_json"], **of_file)
    elif options["workspace"] is None:
        raise click.UsageError("give a file of vectors, or a workspace with -w")
    else:
        _execute(("cluster",), **options)


def _cluster_file(
    path: Path,
    threshold: str,
    sweep: str | None,
    out: Path | None,
    group: str,
    normalise: bool,
    seed: int,
    as_json: bool,
) -> None:
    from rayscan import vectors
    from rayscan.progress import say, track

    given = vectors.read(path)
    if sweep is not None:
        thresholds = vectors.grid(sweep)
    elif threshold == "auto":
        found = vectors.calibrated(given, group, seed, normalise)
        say(f"threshold {found.threshold:.4f}, calibrated on column {group} (error {found.error:.3f})")
        thresholds = [found.threshold]
    else:
        thresholds = vectors.grid(threshold)
    results = []
    with track("cluster", len(thresholds), "thresholds") as advance:
        for one in vectors.partitions(given.values, thresholds, seed, normalise):
            results.append(one)
            advance(1, f"threshold {one.threshold:g}: {one.summary()['clusters']:,} clusters")
    if out is not None:
        vectors.write(out, given, results)
    summaries = [one.summary() for one in results]
    if as_json:
        click.echo(json.dumps(summaries, indent=1))
    else:
        _show_partitions(summaries)


def _show_partitions(summaries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("threshold", "points", "clusters", "singletons", "objective", "seconds", "largest"):
        table.add_column(name, justify="left" if name == "largest" else "right")
    for row in summaries:
        numbers = [f"{row[name]:,}" for name in ("points", "clusters", "singletons")]
        sizes = " ".join(f"{size:,}" for size in row["largest"][:5])
        table.add_row(
            f"{row['threshold']:g}", *numbers, f"{row['objective']:,.2f}", f"{row['seconds']:.2f}", sizes
        )
    Console(soft_wrap=True).print(table)


@main.command(epilog=_EPILOG)
@_stage_options
def campaigns(**options: Any) -> None:
    """Follow clusters from period to period: born, continued, split, merged, gone."""
    _execute(("campaigns",), **options)


@main.command(epilog=_EPILOG)
@_stage_options
def evaluate(**options: Any) -> None:
    """Measure how well similarity tells sources apart, and clusters against labels."""
    _execute(("evaluate",), **options)


@main.command(epilog=_EPILOG)
@_stage_options
def report(**options: Any) -> None:
    """Write the HTML report of a run and print its path."""
    _execute(("report",), **options)


# ---------------------------------------------------------------------------------------------
# looking and keeping
# ---------------------------------------------------------------------------------------------


@main.command()
@_workspace_option
@_config_options
@_json_option
def status(
    workspace: str, preset: str, config_file: Path | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Show per stage and period what is done, due and stale, with row counts.

    Without any settings, those of the last run `main` are taken: what would running it again do?
    """
    from rayscan import pipeline
    from rayscan.tables import Workspace

    config = configuration.load(preset, config_file, sets)
    opened = Workspace.open(workspace)
    if config == configuration.load():
        config = _last_settings(opened, config)
    _show_status(pipeline.status(opened, config), as_json)
    if not as_json:
        _show_last_run(opened, config)


def _last_settings(workspace: Workspace, config: RunConfig) -> RunConfig:
    """The settings of the last run of this name, or `config` where there was none."""
    from rayscan.planning import run_file

    path = run_file(config, "config.yaml")
    try:
        return configuration.from_yaml(workspace.read_bytes(path).decode(), workspace.url(path))
    except FileNotFoundError:
        return config


def _show_status(rows: list[dict[str, Any]], as_json: bool, stages: tuple[str, ...] | None = None) -> None:
    rows = [row for row in rows if stages is None or row["stage"] in stages]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("stage", "period"):
        table.add_column(name)
    for name in ("done", "due", "stale", "rows"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = [f"{row[name]:,}" if row[name] else "" for name in ("done", "due", "stale", "rows")]
        table.add_row(row["stage"], row["period"], *counts)
    Console(soft_wrap=True).print(table)


def _show_last_run(workspace: Workspace, config: RunConfig) -> None:
    from rayscan.planning import run_file

    last = workspace.read_json(run_file(config, "run.json"))
    if last is not None:
        error = f" ({last['error']})" if last["error"] else ""
        click.echo(
            f"\nlast run {last['run_id']}: {last['status']}{error}, finished {last['finished']}", err=True
        )


@main.command()
@_workspace_option
@click.option(
    "--older-than",
    "hours",
    default=168.0,
    show_default=True,
    help="Hours a file must have been unused. Shorter than a running job endangers that job.",
)
@click.option("--dry-run", is_flag=True, help="List the files and delete none.")
def vacuum(workspace: str, hours: float, dry_run: bool) -> None:
    """Delete files that no table uses any more, leftovers of crashes too. Prints their paths."""
    from rayscan.tables import TABLE_NAMES, Workspace

    opened = Workspace.open(workspace)
    count = 0
    for name in TABLE_NAMES:
        for path in opened.table(name).vacuum(hours, dry_run):
            click.echo(f"{name}/{path}")
            count += 1
    click.echo(f"{count:,} files {'would be' if dry_run else 'were'} deleted", err=True)


@main.group("config")
def config_group() -> None:
    """Show, check and describe settings.

    Settings come, from weakest to strongest, from their defaults, a preset, a file, environment variables
    (RAYSCAN_TRAIN__STEPS=500) and --set train.steps=500.
    """


@config_group.command("show")
@_config_options
def config_show(preset: str, config_file: Path | None, sets: tuple[str, ...]) -> None:
    """Print the merged settings as YAML."""
    click.echo(configuration.as_yaml(configuration.load(preset, config_file, sets)), nl=False)


@config_group.command("validate")
@_config_options
def config_validate(preset: str, config_file: Path | None, sets: tuple[str, ...]) -> None:
    """Check the settings; the exit code is 2 and the error names the setting if they are wrong."""
    from rayscan.planning import config_hash

    found = configuration.load(preset, config_file, sets)
    click.echo(f"the settings are valid; hash {config_hash(found)}", err=True)


@config_group.command("schema")
def config_schema() -> None:
    """Print the JSON schema of all settings, with descriptions, units and ranges."""
    click.echo(json.dumps(RunConfig.model_json_schema(), indent=1))
